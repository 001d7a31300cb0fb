--- Ghost text of our own, for Neovim 0.10 and 0.11.

local suggestion = require("deepseek_lsp.suggestion")
local server = require("deepseek_lsp.server")

local M = {}

local PAUSE_MS = 75
local namespace = vim.api.nvim_create_namespace("deepseek_lsp.ghost")

---@type deepseek_lsp.Suggestion?
local current
local asked = 0

vim.api.nvim_set_hl(0, "DeepseekGhost", { link = "NonText", default = true })

local function clear()
  for _, buffer in ipairs(vim.api.nvim_list_bufs()) do
    vim.api.nvim_buf_clear_namespace(buffer, namespace, 0, -1)
  end
end

--- Shows what of the current suggestion is still to be written; forgets one that does not fit any more.
local function show()
  clear()
  local rest = current and suggestion.rest(current)
  if not rest then
    current = nil
    return
  end
  local lines = vim.tbl_map(function(line)
    return { { line, "DeepseekGhost" } }
  end, vim.split(rest, "\n"))
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  vim.api.nvim_buf_set_extmark(0, namespace, row - 1, col, {
    virt_text = lines[1],
    virt_text_pos = "inline",
    virt_lines = vim.list_slice(lines, 2),
  })
end

local function ask(buffer)
  asked = asked + 1
  local mine = asked
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  local params = {
    textDocument = vim.lsp.util.make_text_document_params(buffer),
    position = { line = row - 1, character = col },
    context = { triggerKind = 2 },
  }
  server.request("textDocument/inlineCompletion", params, function(_, result)
    local item = result and (result.items or result)[1]
    if mine ~= asked or vim.fn.mode() ~= "i" then
      return
    end
    current = item and {
      buffer = buffer,
      row = item.range.start.line,
      col = item.range.start.character,
      end_col = item.range["end"].character,
      text = item.insertText,
      command = item.command,
    }
    show()
  end, buffer)
end

local function moved(event)
  show()
  asked = asked + 1
  local mine = asked
  if #vim.lsp.get_clients({ name = server.name, bufnr = event.buf }) == 0 then
    return
  end
  vim.defer_fn(function()
    if mine == asked and vim.fn.mode() == "i" and vim.api.nvim_get_current_buf() == event.buf then
      ask(event.buf)
    end
  end, PAUSE_MS)
end

function M.enable(enable)
  local group = vim.api.nvim_create_augroup("deepseek_lsp.ghost", {})
  current = nil
  clear()
  if enable then
    vim.api.nvim_create_autocmd({ "InsertEnter", "CursorMovedI", "TextChangedP" }, { group = group, callback = moved })
    vim.api.nvim_create_autocmd("InsertLeave", {
      group = group,
      callback = function()
        asked, current = asked + 1, nil
        clear()
      end,
    })
  end
end

function M.accept(part)
  local taken = current
  if not taken or not suggestion.rest(taken) then
    return false
  end
  vim.schedule(function() -- a mapping with <expr> may not change the buffer
    suggestion.write(taken, part)
  end)
  return true
end

return M
