--- Where something is asked about: lines of a buffer and what is reported there.

local M = {}

---@class deepseek_lsp.Place
---@field buffer integer
---@field window integer where code that was asked for is inserted
---@field title string such as `shop.py, lines 3 to 7`
---@field diagnostics table[] what is reported there, in LSP's form
---@field reference { uri: string, range: table, diagnostics: string[] } the place as the server names it; columns are bytes

--- What is reported in the lines from `first` to `last`, counted from 1, in LSP's form.
local function reported(buffer, first, last)
  local found = {}
  for _, one in ipairs(vim.diagnostic.get(buffer)) do
    local end_row, end_col = one.end_lnum or one.lnum, one.end_col or one.col
    if one.lnum < last and end_row >= first - 1 then
      local range = { start = { line = one.lnum, character = one.col }, ["end"] = { line = end_row, character = end_col } }
      table.insert(found, { range = range, message = one.message, source = one.source, code = one.code, severity = one.severity })
    end
  end
  return found
end

--- A diagnostic in words.
local function said(diagnostic)
  local source = diagnostic.source and diagnostic.source .. ": " or ""
  local code = diagnostic.code and (" (%s)"):format(diagnostic.code) or ""
  return ("line %d: %s%s%s"):format(diagnostic.range.start.line + 1, source, diagnostic.message, code)
end

--- The current window's place: its cursor, or the lines from `first` to `last`, counted from 1.
---@param first? integer
---@param last? integer
---@return deepseek_lsp.Place
function M.here(first, last)
  local buffer = vim.api.nvim_get_current_buf()
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  local start, stop = { line = row - 1, character = col }, { line = row - 1, character = col }
  local name = vim.fn.fnamemodify(vim.api.nvim_buf_get_name(buffer), ":t")
  local title = ("%s, line %d"):format(name, row)
  if first then
    start, stop = { line = first - 1, character = 0 }, { line = last - 1, character = #vim.fn.getline(last) }
    title = first == last and ("%s, line %d"):format(name, first) or ("%s, lines %d to %d"):format(name, first, last)
  end
  local diagnostics = reported(buffer, first or row, last or row)
  return {
    buffer = buffer,
    window = vim.api.nvim_get_current_win(),
    title = title,
    diagnostics = diagnostics,
    reference = {
      uri = vim.uri_from_bufnr(buffer),
      range = { start = start, ["end"] = stop },
      diagnostics = vim.tbl_map(said, diagnostics),
    },
  }
end

return M
