--- A change that the model proposes: shown as a diff, then made, or not.

local M = {}

local compared = vim.text and vim.text.diff or vim.diff -- renamed in 0.12

---@class deepseek_lsp.File what a change does to one file
---@field path string
---@field is_new boolean
---@field version? integer of the text it holds for
---@field edits table[] in LSP's form

---@return deepseek_lsp.File[]
local function files(edit)
  local found, new = {}, {}
  for _, change in ipairs(edit.documentChanges) do
    if change.kind == "create" then
      new[change.uri] = true
    else
      local edits = vim.tbl_map(function(one)
        return { range = one.range, newText = one.newText }
      end, change.edits)
      local document = change.textDocument
      local file = { path = vim.uri_to_fname(document.uri), is_new = new[document.uri] or false, version = document.version, edits = edits }
      table.insert(found, file)
    end
  end
  return found
end

--- Whether the server wants the user to see it first.
function M.asks(edit)
  for _, annotation in pairs(edit.changeAnnotations or {}) do
    if annotation.needsConfirmation then
      return true
    end
  end
  return false
end

--- The buffer of a file, loaded.
local function buffer_of(file)
  local buffer = vim.fn.bufadd(file.path)
  vim.fn.bufload(buffer)
  return buffer
end

local function text_of(buffer)
  return table.concat(vim.api.nvim_buf_get_lines(buffer, 0, -1, false), "\n") .. "\n"
end

--- What would change, as a diff.
---@return string
function M.diff(edit, encoding)
  local parts = {}
  for _, file in ipairs(files(edit)) do
    local before = file.is_new and "" or text_of(buffer_of(file))
    local scratch = vim.api.nvim_create_buf(false, true)
    vim.api.nvim_buf_set_lines(scratch, 0, -1, false, vim.split(before:gsub("\n$", ""), "\n"))
    vim.lsp.util.apply_text_edits(vim.deepcopy(file.edits), scratch, encoding)
    local after = text_of(scratch):gsub("\n+$", "\n")
    vim.api.nvim_buf_delete(scratch, { force = true })
    local path = vim.fn.fnamemodify(file.path, ":.")
    local heads = file.is_new and { "--- /dev/null", "+++ " .. path .. " (new)" } or { "--- " .. path, "+++ " .. path }
    table.insert(parts, table.concat(heads, "\n") .. "\n" .. compared(before, after, { ctxlen = 3 }))
  end
  return vim.trim(table.concat(parts, "\n"))
end

--- Why it cannot be made any more, if so.
local function outdated(file)
  local name = vim.fs.basename(file.path)
  if file.is_new then
    return vim.uv.fs_stat(file.path) and name .. " is there by now, so nothing is written: ask again."
  end
  local buffer = buffer_of(file)
  if not vim.bo[buffer].modifiable then
    return name .. " cannot be changed here ('nomodifiable')."
  end
  local newest = vim.lsp.util.buf_versions[buffer]
  return file.version and newest and newest > file.version and name .. " changed meanwhile, so nothing is changed: ask again."
end

--- Makes the change. New files are written, others are changed in their buffers.
---@return string? problem when nothing was done
---@return integer[] buffers
function M.make(edit, encoding)
  local changed = files(edit)
  for _, file in ipairs(changed) do
    local problem = outdated(file)
    if problem then
      return problem, {}
    end
  end
  local buffers = {}
  for _, file in ipairs(changed) do
    local buffer = buffer_of(file)
    vim.bo[buffer].buflisted = true
    vim.lsp.util.apply_text_edits(file.edits, buffer, encoding)
    if file.is_new then
      if vim.api.nvim_buf_get_lines(buffer, -2, -1, false)[1] == "" then
        vim.api.nvim_buf_set_lines(buffer, -2, -1, false, {}) -- the line that an empty buffer has
      end
      vim.api.nvim_buf_call(buffer, function()
        vim.cmd("silent write ++p")
      end)
    end
    table.insert(buffers, buffer)
  end
  return nil, buffers
end

return M
