--- Ghost text by Neovim itself (0.12 and later).

local suggestion = require("deepseek_lsp.suggestion")
local server = require("deepseek_lsp.server")

local M = {}

function M.enable(enable)
  vim.lsp.inline_completion.enable(enable)
end

--- Takes a part of what is shown. We write it ourselves, since Neovim takes only all of it, and twice what was typed of it since.
function M.accept(part)
  local buffer = vim.api.nvim_get_current_buf()
  return vim.lsp.inline_completion.get({
    on_accept = function(item)
      local client = vim.lsp.get_client_by_id(item.client_id)
      if not client or client.name ~= server.name or not item.range then
        return item
      end
      local row, col, _, end_col = item.range:to_extmark()
      suggestion.write({
        buffer = buffer,
        row = row,
        col = col,
        end_col = end_col,
        text = item.insert_text,
        command = item.command,
      }, part)
    end,
  })
end

return M
