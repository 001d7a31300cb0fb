--- Questions whose answer comes word by word: deepseek/chat, and deepseek/stream with the words.

local server = require("deepseek_lsp.server")

local M = {}

---@class deepseek_lsp.Hearer
---@field piece fun(text: string, title: string)
---@field again fun() what was heard is void, another attempt begins
---@field over fun(problem?: string, result?: table)

---@type table<string, { on: deepseek_lsp.Hearer, client: integer }>
local open = {} -- by the id that the words stream under
local asked = 0

--- Without JSON's nulls, which would count as something.
local function plain(value)
  if type(value) ~= "table" then
    return value
  end
  local found = {}
  for key, part in pairs(value) do
    if part ~= vim.NIL then
      found[key] = plain(part)
    end
  end
  return found
end

--- Asks, and gives a function that stops the answer, after which nothing is heard of it, and says whether there was something to stop.
---@param client vim.lsp.Client
---@param buffer integer whose latest text the server has to know
---@param on deepseek_lsp.Hearer
---@return fun(): boolean
function M.ask(client, buffer, params, on)
  asked = asked + 1
  local id = "answer-" .. asked
  params.stream = id
  open[id] = { on = on, client = client.id }
  local request = server.call(client, "deepseek/chat", params, function(error, result)
    if open[id] then
      open[id] = nil
      on.over(error and error.message, plain(result))
    end
  end, buffer)
  return function()
    local is_open = open[id] ~= nil
    if is_open then
      open[id] = nil
      server.cancel(client, request)
    end
    return is_open
  end
end

--- deepseek/stream
function M.heard(_, params)
  local asker = open[params.id]
  if not asker then
    return
  end
  if params.restart then
    asker.on.again()
  elseif params.text then
    asker.on.piece(params.text, params.title)
  end
end

--- The server is gone, and with it every answer it owed.
function M.lost(client_id)
  for id, asker in pairs(open) do
    if asker.client == client_id then
      open[id] = nil
      asker.on.over("The server ended before it had answered: ask again.")
    end
  end
end

return M
