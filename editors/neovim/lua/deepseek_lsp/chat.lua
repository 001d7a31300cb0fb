--- The chat: what was said in a window at the side, and below it one for the next question. The server keeps the conversation.

local action = require("deepseek_lsp.action")
local pages = require("deepseek_lsp.page")
local server = require("deepseek_lsp.server")
local stream = require("deepseek_lsp.stream")

local M = {}

local INPUT_LINES = 5
local KEYS = "<CR> or <C-s> sends · <Esc> stops"

---@type deepseek_lsp.Page?
local page
local input -- the buffer of the question
local source -- the window from which the chat was opened last
local about = {} ---@type deepseek_lsp.Place[] what the next question refers to
local talk -- { id, client }: the conversation, and the server that knows it
local stop -- ends the answer that is being written

local function say(text)
  vim.notify("deepseek-lsp: " .. text, vim.log.levels.WARN)
end

local function titles(list)
  return table.concat(
    vim.tbl_map(function(place)
      return place.title
    end, list),
    "; "
  )
end

--- The input's window says what the question is about.
local function head()
  local subject = #about > 0 and "About " .. titles(about):gsub("%%", "%%%%") .. " · " or ""
  for _, window in ipairs(vim.fn.win_findbuf(input)) do
    vim.wo[window].winbar = (" %s%%<%s"):format(subject, KEYS) -- what there is no room for goes from the keys
  end
end

local function typed()
  return vim.trim(table.concat(vim.api.nvim_buf_get_lines(input, 0, -1, false), "\n"))
end

local function type_in(text)
  vim.api.nvim_buf_set_lines(input, 0, -1, false, vim.split(text, "\n"))
end

--- The server that knows the conversation while there is one, else that of the file the chat was opened from, else any.
local function client_now()
  local buffer = source and vim.api.nvim_win_is_valid(source) and vim.api.nvim_win_get_buf(source)
  local known = talk and vim.lsp.get_client_by_id(talk.client)
  return known or buffer and server.client(buffer) or server.client(), buffer
end

local function answered(client, start, problem, result)
  stop = nil
  if problem then
    return page:append("\n\n**Not answered:** " .. problem .. "\n\n")
  end
  if result.conversation then
    talk = { id = result.conversation, client = client.id }
  end
  if result.edit then
    action.offer(result.title, result.edit, client.offset_encoding)
    page:write(start, "> " .. result.title .. ": a change, shown beside.")
  else
    page:write(start, result.text)
  end
  for _, note in ipairs(result.notes) do
    page:append("\n\n> " .. note)
  end
  page:append("\n\n")
end

--- Sends the question that is typed in.
function M.send()
  local question = typed()
  local client, buffer = client_now()
  if question == "" then
    return
  end
  if stop then
    return say("an answer is being written: <Esc> stops it.")
  end
  if not client then
    return say(server.missing())
  end
  if talk and talk.client ~= client.id then
    page:append("> The server was started anew and does not know what was said above.\n\n")
    talk = nil
  end
  local asked_about = about
  about = {}
  type_in("")
  head()
  local subject = #asked_about > 0 and "\n\n> About " .. titles(asked_about) or ""
  page:append(("### You\n\n%s%s\n\n### DeepSeek\n\n"):format(question, subject))
  local start = page:mark()
  local halt = stream.ask(client, buffer or 0, {
    text = question,
    conversation = talk and talk.id,
    references = vim.tbl_map(function(place)
      return place.reference
    end, asked_about),
  }, {
    piece = function(text)
      page:append(text)
    end,
    again = function()
      page:write(start, "")
    end,
    over = function(problem, result)
      answered(client, start, problem, result)
      if problem and typed() == "" then
        about = asked_about
        type_in(question)
        head()
      end
    end,
  })
  stop = function()
    halt()
    stop = nil
    page:append("\n\n> Stopped: this answer is not part of the conversation.\n\n")
  end
end

--- Stops the answer that is being written; what is there of it stays.
function M.stop()
  if stop then
    stop()
  end
end

--- Forgets the conversation, here and in the server.
function M.begin()
  M.stop()
  local client = talk and vim.lsp.get_client_by_id(talk.client)
  if client then
    server.call(client, "deepseek/chat/end", { conversation = talk.id }, function() end)
  end
  talk, about = nil, {}
  page:write({ 0, 0 }, "")
end

local function map(buffer, modes, key, what, description)
  vim.keymap.set(modes, key, what, { buffer = buffer, nowait = true, desc = description })
end

local function make()
  page = pages.new(function()
    return source
  end)
  input = vim.api.nvim_create_buf(false, true)
  vim.bo[input].filetype = "markdown"
  vim.api.nvim_buf_set_name(page.buffer, "deepseek://chat")
  vim.api.nvim_buf_set_name(input, "deepseek://question")
  map(input, "n", "<CR>", M.send, "Send the question")
  map(input, { "n", "i" }, "<C-s>", M.send, "Send the question")
  map(input, "n", "<Esc>", M.stop, "Stop the answer")
  map(page.buffer, "n", "<Esc>", M.stop, "Stop the answer")
  map(page.buffer, "n", "q", M.close, "Close the chat; :DeepseekChat opens it again")
  for _, key in ipairs({ "i", "a", "o" }) do
    map(page.buffer, "n", key, M.focus, "Write a question")
  end
end

--- To where the question is written.
function M.focus()
  vim.api.nvim_set_current_win(vim.fn.win_findbuf(input)[1])
  vim.cmd.startinsert({ bang = true })
end

function M.close()
  for _, buffer in ipairs({ page.buffer, input }) do
    for _, window in ipairs(vim.fn.win_findbuf(buffer)) do
      vim.api.nvim_win_close(window, true)
    end
  end
end

local function show()
  local function plain(window)
    for option, value in pairs({ number = false, relativenumber = false, signcolumn = "no", wrap = true, linebreak = true }) do
      vim.wo[window][option] = value
    end
  end
  M.close()
  vim.cmd(("botright vertical %dsplit"):format(math.max(math.floor(vim.o.columns * 0.45), 30)))
  vim.api.nvim_win_set_buf(0, page.buffer)
  plain(0)
  vim.wo.conceallevel = 2
  vim.api.nvim_win_set_cursor(0, { vim.api.nvim_buf_line_count(page.buffer), 0 })
  vim.cmd(("belowright %dsplit"):format(INPUT_LINES + 1))
  vim.api.nvim_win_set_buf(0, input)
  plain(0)
  vim.wo.winfixheight = true
end

local function ready()
  if not (page and vim.api.nvim_buf_is_valid(page.buffer) and vim.api.nvim_buf_is_valid(input)) then
    make()
  end
  if vim.bo.buftype == "" then
    source = vim.api.nvim_get_current_win()
  end
end

local function shown()
  if #vim.fn.win_findbuf(page.buffer) == 0 or #vim.fn.win_findbuf(input) == 0 then
    show()
  end
  head()
end

--- Goes on with a conversation that began elsewhere.
function M.go_on(conversation, client, title, text)
  ready()
  M.begin()
  talk = { id = conversation, client = client.id }
  page:append(("### DeepSeek\n\n> %s\n\n%s\n\n"):format(title, text))
  shown()
  M.focus()
end

--- Opens the chat.
---@param place? deepseek_lsp.Place what the next question is about
---@param question? string sent at once
---@param anew boolean begin a new conversation
function M.open(place, question, anew)
  ready()
  if anew then
    M.begin()
  end
  if place then
    table.insert(about, place)
  end
  shown()
  if question ~= "" then
    type_in(question)
    M.send()
  end
  M.focus()
end

return M
