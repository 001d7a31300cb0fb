--- A suggestion and how it gets into the buffer, all of it or a part.

local M = {}

---@class deepseek_lsp.Suggestion
---@field buffer integer
---@field row integer counted from 0, as are all columns, in bytes
---@field col integer where the text goes
---@field end_col integer up to here it replaces what is there
---@field text string
---@field command? table what the server wants to hear when it is accepted
---@field client_id integer

local PARTS = {
  all = function(text)
    return text
  end,
  word = function(text)
    return text:match("^%s*[%w_\128-\255]+") or text:match("^%s*[^%w_%s\128-\255]+") or text
  end,
  line = function(text)
    return text:match("^\n?[^\n]*")
  end,
}

--- What of the suggestion is still to be written at the cursor; nil when it does not fit there (any more).
---@param suggestion deepseek_lsp.Suggestion
function M.rest(suggestion)
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  if vim.api.nvim_get_current_buf() ~= suggestion.buffer or row - 1 ~= suggestion.row or col < suggestion.col then
    return nil
  end
  local typed = vim.api.nvim_get_current_line():sub(suggestion.col + 1, col)
  if vim.startswith(suggestion.text, typed) and #typed < #suggestion.text then
    return suggestion.text:sub(#typed + 1)
  end
end

--- Writes a part ("all", "word" or "line") of the rest at the cursor.
---@param suggestion deepseek_lsp.Suggestion
function M.write(suggestion, part)
  local rest = M.rest(suggestion)
  if not rest then
    return
  end
  local text = PARTS[part](rest)
  local whole = text == rest
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  local replaced = whole and suggestion.end_col - suggestion.col or 0
  local lines = vim.split(text, "\n")
  vim.api.nvim_buf_set_text(suggestion.buffer, row - 1, col, row - 1, col + replaced, lines)
  vim.api.nvim_win_set_cursor(0, { row + #lines - 1, (#lines == 1 and col or 0) + #lines[#lines] })
  if whole and suggestion.command then
    local params = { command = suggestion.command.command, arguments = suggestion.command.arguments }
    require("deepseek_lsp.server").request("workspace/executeCommand", params, function() end, suggestion.buffer)
  end
end

return M
