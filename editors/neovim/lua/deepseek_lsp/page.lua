--- A buffer of Markdown that words are written into as they come, and from which code can be taken.

local M = {}

---@class deepseek_lsp.Page
---@field buffer integer
---@field changed fun() called after every change
---@field target fun(): integer? the window into which code is inserted
local Page = {}
Page.__index = Page

---@return deepseek_lsp.Page
function M.new(target)
  local page = setmetatable({ buffer = vim.api.nvim_create_buf(false, true), changed = function() end, target = target }, Page)
  page:is("markdown")
  vim.bo[page.buffer].modifiable = false
  vim.keymap.set("n", "gy", function()
    page:yank()
  end, { buffer = page.buffer, desc = "Yank the code block here" })
  vim.keymap.set("n", "gp", function()
    page:put()
  end, { buffer = page.buffer, desc = "Insert the code block here below the cursor of the file asked about" })
  return page
end

--- Says what the text is, for its colours.
function Page:is(filetype)
  vim.bo[self.buffer].filetype = filetype
  pcall(vim.treesitter.start, self.buffer, filetype)
end

---@return { [1]: integer, [2]: integer } the end of the text, which `cut` takes
function Page:mark()
  local last = vim.api.nvim_buf_line_count(self.buffer) - 1
  return { last, #vim.api.nvim_buf_get_lines(self.buffer, last, last + 1, false)[1] }
end

--- Replaces what comes after the mark. A cursor on the last line stays on the last line: so one follows the text, or reads above it.
function Page:write(mark, text)
  if not vim.api.nvim_buf_is_valid(self.buffer) then
    return
  end
  local last = self:mark()
  local following = vim.tbl_filter(function(window)
    return vim.api.nvim_win_get_cursor(window)[1] == last[1] + 1
  end, vim.fn.win_findbuf(self.buffer))
  vim.bo[self.buffer].modifiable = true
  vim.api.nvim_buf_set_text(self.buffer, mark[1], mark[2], last[1], last[2], vim.split(text, "\n"))
  vim.bo[self.buffer].modifiable = false
  last = self:mark()
  for _, window in ipairs(following) do
    vim.api.nvim_win_set_cursor(window, { last[1] + 1, last[2] })
  end
  self.changed()
end

function Page:append(text)
  self:write(self:mark(), text)
end

--- The code block at the current window's cursor, or the last one above it, or the first one below.
---@return string[]?
function Page:block()
  local cursor = vim.api.nvim_win_get_cursor(0)[1]
  local found, fence, from
  local lines = vim.api.nvim_buf_get_lines(self.buffer, 0, -1, false)
  for row, line in ipairs(lines) do
    local mark = line:match("^%s*(```+)") or line:match("^%s*(~~~+)")
    if not fence and mark then
      if found and row > cursor then
        break
      end
      fence, from = mark, row + 1
    elseif fence and mark and vim.startswith(mark, fence) and line:match("^%s*[`~]+%s*$") then
      found, fence = { from, row - 1 }, nil
    end
  end
  if fence and (not found or from <= cursor) then -- one that is still being written
    found = { from, #lines }
  end
  return found and vim.list_slice(lines, unpack(found))
end

function Page:yank()
  local block = self:block()
  if not block then
    return vim.notify("deepseek-lsp: there is no code block here.", vim.log.levels.WARN)
  end
  vim.fn.setreg(vim.v.register, block, "l")
  vim.notify(("deepseek-lsp: %d lines yanked."):format(#block))
end

--- Inserts the code block below the cursor of the target's window.
function Page:put()
  local block, window = self:block(), self.target()
  if not block then
    return vim.notify("deepseek-lsp: there is no code block here.", vim.log.levels.WARN)
  end
  if not window or not vim.api.nvim_win_is_valid(window) then
    return vim.notify("deepseek-lsp: the window to insert into is gone; gy yanks the code.", vim.log.levels.WARN)
  end
  local buffer, row = vim.api.nvim_win_get_buf(window), vim.api.nvim_win_get_cursor(window)[1]
  if not vim.bo[buffer].modifiable then
    return vim.notify("deepseek-lsp: that buffer cannot be changed; gy yanks the code.", vim.log.levels.WARN)
  end
  vim.api.nvim_buf_set_lines(buffer, row, row, false, block)
  vim.notify(("deepseek-lsp: %d lines inserted below line %d."):format(#block, row))
end

return M
