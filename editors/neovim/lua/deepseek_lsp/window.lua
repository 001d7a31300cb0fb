--- A floating window over the editor that grows with its text.

local M = {}

local MOST_COLUMNS = 100

---@class deepseek_lsp.Window
---@field id integer
local Window = {}
Window.__index = Window

--- Opens the buffer; `closed` is called once when the window is gone, however it went. Then the buffer is gone too.
---@return deepseek_lsp.Window
function M.open(buffer, title, keys, closed)
  vim.bo[buffer].bufhidden = "wipe"
  vim.cmd.stopinsert()
  local window = setmetatable({ buffer = buffer, title = title, keys = keys }, Window)
  window.id = vim.api.nvim_open_win(buffer, true, window:layout(1))
  vim.wo[window.id].wrap, vim.wo[window.id].linebreak, vim.wo[window.id].conceallevel = true, true, 2
  for _, key in ipairs({ "q", "<Esc>" }) do
    vim.keymap.set("n", key, function()
      window:close()
    end, { buffer = buffer, nowait = true, desc = "Close, and stop what is being written" })
  end
  local group = vim.api.nvim_create_augroup("deepseek_lsp.window." .. window.id, {})
  vim.api.nvim_create_autocmd("VimResized", {
    group = group,
    callback = function()
      window:fit()
    end,
  })
  vim.api.nvim_create_autocmd("WinClosed", {
    group = group,
    pattern = tostring(window.id),
    callback = function()
      vim.api.nvim_del_augroup_by_id(group)
      if closed then
        closed()
      end
    end,
  })
  window:fit()
  return window
end

function Window:layout(height)
  local width = math.max(math.min(vim.o.columns - 8, MOST_COLUMNS), 20)
  return {
    relative = "editor",
    row = math.max(math.floor((vim.o.lines - vim.o.cmdheight - height) / 2) - 2, 0),
    col = math.floor((vim.o.columns - width) / 2) - 1,
    width = width,
    height = height,
    style = "minimal",
    border = "rounded",
    title = " " .. self.title .. " ",
    footer = " " .. self.keys .. " ",
    footer_pos = "right",
  }
end

function Window:is_open()
  return vim.api.nvim_win_is_valid(self.id)
end

--- As high as the text, as far as there is room.
function Window:fit()
  if self:is_open() then
    local text = vim.api.nvim_win_text_height(self.id, {}).all
    local room = vim.o.lines - vim.o.cmdheight - 5
    vim.api.nvim_win_set_config(self.id, self:layout(math.max(math.min(text, room), 1)))
    vim.api.nvim_win_call(self.id, function()
      if text <= room then
        vim.fn.winrestview({ topline = 1 })
      elseif vim.fn.line(".") == vim.fn.line("$") then
        vim.cmd("normal! zb")
      end
    end)
  end
end

--- Says what is shown and which keys there are.
function Window:name(title, keys)
  self.title, self.keys = title, keys
  self:fit()
end

function Window:close()
  if self:is_open() then
    vim.api.nvim_win_close(self.id, true)
  end
end

return M
