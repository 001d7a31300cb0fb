--- An action at a place: its words in a floating window as they come, or the change it proposes.

local edit = require("deepseek_lsp.edit")
local pages = require("deepseek_lsp.page")
local server = require("deepseek_lsp.server")
local stream = require("deepseek_lsp.stream")
local windows = require("deepseek_lsp.window")

local M = {}

local WAITING = "The model is asked …"
local READING = "q closes · gy yanks a code block · gp inserts it"

---@type { window: deepseek_lsp.Window, stop: fun() }?
local current

local function say(text, level)
  vim.notify("deepseek-lsp: " .. text, level or vim.log.levels.WARN)
end

--- Makes a change and shows what of it lies elsewhere.
local function make(title, change, encoding)
  local problem, buffers = edit.make(change, encoding)
  if problem then
    return say(problem)
  end
  for _, buffer in ipairs(buffers) do
    if vim.tbl_isempty(vim.fn.win_findbuf(buffer)) then
      vim.cmd.sbuffer(buffer)
    end
  end
  say(title .. ": done.", vim.log.levels.INFO)
end

--- Shows a change in the window, where the user makes it or leaves it.
local function propose(window, page, title, change, encoding)
  page:is("diff")
  page:write({ 0, 0 }, edit.diff(change, encoding))
  vim.api.nvim_win_set_cursor(window.id, { 1, 0 })
  vim.keymap.set("n", "<CR>", function()
    window:close()
    make(title, change, encoding)
  end, { buffer = page.buffer, desc = "Make the change" })
  window:name(title, "<CR> makes the change · q leaves everything as it is")
end

--- Shows a change that came without a window of its own.
function M.offer(title, change, encoding)
  local page = pages.new(function() end)
  propose(windows.open(page.buffer, title, ""), page, title, change, encoding)
end

--- Words to be read stay in the window.
local function keep(window, page, title, result, client)
  for _, note in ipairs(result.notes) do
    page:append("\n\n> " .. note)
  end
  if not result.conversation then
    return window:name(title, READING)
  end
  vim.keymap.set("n", "c", function()
    window:close()
    require("deepseek_lsp.chat").go_on(result.conversation, client, title, result.text)
  end, { buffer = page.buffer, nowait = true, desc = "Ask on in the chat" })
  window:name(title, "c asks on in the chat · " .. READING)
end

--- A change is shown where the server wants that, and else made.
local function change(window, page, title, result, client)
  for _, note in ipairs(result.notes) do
    say(note, vim.log.levels.INFO)
  end
  if edit.asks(result.edit) then
    return propose(window, page, title, result.edit, client.offset_encoding)
  end
  window:close()
  make(title, result.edit, client.offset_encoding)
end

--- Does the action `name`.
---@param name string
---@param place deepseek_lsp.Place
---@param instruction? string
function M.run(name, place, instruction)
  local client = server.awaited(place.buffer)
  if not client then
    return say(server.missing())
  end
  if current then
    current.window:close()
  end
  local page = pages.new(function()
    return place.window
  end)
  local heard, title, mine = "", name:gsub("_", " "), nil
  page:append(WAITING)
  local window = windows.open(page.buffer, title, "q stops", function()
    mine.stop()
    current = current ~= mine and current or nil
  end)
  page.changed = function()
    window:fit()
  end
  local params = { text = ("/%s %s"):format(name, instruction or ""), references = { place.reference } }
  local stop = stream.ask(client, place.buffer, params, {
    piece = function(text, of)
      if heard == "" then
        title = of
        window:name(title, "q stops")
        page:write({ 0, 0 }, text)
      else
        page:append(text)
      end
      heard = heard .. text
    end,
    again = function()
      heard = ""
      page:write({ 0, 0 }, WAITING)
    end,
    over = function(problem, result)
      if problem and heard == "" then
        window:close()
        say(problem)
      elseif problem then
        page:append("\n\n**Not done:** " .. problem)
        window:name(title, READING)
      elseif result.edit then
        change(window, page, result.title, result, client)
      else
        if vim.trim(heard) ~= result.text then
          page:write({ 0, 0 }, result.text)
        end
        keep(window, page, result.title, result, client)
      end
    end,
  })
  mine = {
    window = window,
    stop = function()
      if stop() then
        page:append("\n\n> Stopped.")
        window:name(title, READING)
      end
    end,
  }
  current = mine
end

--- Stops the answer that is being written; what is there of it stays.
function M.stop()
  if current then
    current.stop()
  end
end

--- For menus of code actions: the commands `deepseek-lsp.run` and `deepseek-lsp.input` of the server.
function M.chosen(command, context)
  local asked, question = unpack(command.arguments)
  local window = vim.api.nvim_get_current_win()
  local reference = { uri = asked.uri, range = asked.range, diagnostics = asked.diagnostics }
  local place = { buffer = context.bufnr, window = window, reference = reference }
  if not question then
    return M.run(asked.action, place)
  end
  vim.ui.input({ prompt = question .. " " }, function(words)
    if words and words ~= "" then
      M.run(asked.action, place, words)
    end
  end)
end

return M
