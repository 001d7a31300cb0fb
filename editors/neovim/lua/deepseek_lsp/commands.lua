--- The user commands.

local action = require("deepseek_lsp.action")
local chat = require("deepseek_lsp.chat")
local places = require("deepseek_lsp.place")
local server = require("deepseek_lsp.server")
local windows = require("deepseek_lsp.window")

local M = {}

local LIST_MS = 1000

local function say(text)
  vim.notify("deepseek-lsp: " .. text, vim.log.levels.WARN)
end

--- The place a command is given: its range, or the cursor.
local function place_of(args)
  return places.here(args.range > 0 and args.line1 or nil, args.line2)
end

--- The actions that fit a place, as the server's menu has them: what each would be run with, and what it asks for first.
---@return table<string, lsp.Command>
local function offered(place)
  local found = {}
  local client = server.client(place.buffer)
  local params = {
    textDocument = { uri = place.reference.uri },
    range = place.reference.range,
    context = { diagnostics = place.diagnostics },
  }
  for _, item in ipairs(client and server.call_now(client, "textDocument/codeAction", params, LIST_MS, place.buffer) or {}) do
    found[item.command.arguments[1].action] = item.command
  end
  return found
end

local function explain(args)
  action.run(args.range > 0 and "explain" or "explain_symbol", place_of(args))
end

local function fix(args)
  local place = place_of(args)
  if #place.diagnostics == 0 then
    return say("nothing is reported here: go to a line with a diagnostic (]d).")
  end
  action.run("fix", place)
end

local function simply(name)
  return function(args)
    action.run(name, place_of(args))
  end
end

local function is_ours(item)
  local command = type(item.command) == "table" and item.command.command or item.command
  return type(command) == "string" and vim.startswith(command, "deepseek-lsp.")
end

--- Any action by its name, or a menu of those that fit.
local function any(args)
  local name, instruction = args.args:match("^(%S*)%s*(.*)$")
  local place = place_of(args)
  if not server.awaited(place.buffer) then
    return say(server.missing())
  end
  if name == "" then
    local range = args.range > 0 and { start = { args.line1, 0 }, ["end"] = { args.line2, #vim.fn.getline(args.line2) } } or nil
    local context = { diagnostics = place.diagnostics } -- also those of other servers, which Neovim would leave out
    return vim.lsp.buf.code_action({ range = range, context = context, filter = is_ours })
  end
  local item = instruction == "" and offered(place)[name]
  if item and item.arguments[2] then
    return action.chosen(item, { bufnr = place.buffer })
  end
  action.run(name, place, instruction)
end

local filling -- ends what is being filled in

--- Writes at the end of the cursor's line, or into the holes marked in a range.
local function fill(args)
  local place = place_of(args)
  local client = server.awaited(place.buffer)
  if not client then
    return say(server.missing())
  end
  if args.range == 0 then
    place.reference.range.start.character = #vim.api.nvim_get_current_line()
    place.reference.range["end"] = place.reference.range.start
  end
  local asked = { uri = place.reference.uri, range = place.reference.range, instruction = args.args }
  local params = { command = "deepseek-lsp.fill", arguments = { asked } }
  local request = server.call(client, "workspace/executeCommand", params, function(error)
    filling = nil
    if error then
      say(error.message)
    end
  end, place.buffer)
  filling = function()
    filling = nil
    server.cancel(client, request)
  end
end

local function talk(args)
  local place = args.range > 0 and place_of(args) or nil
  if not server.awaited() then
    return say(server.missing())
  end
  chat.open(place, args.args, args.bang)
end

local function stop()
  action.stop()
  chat.stop()
  if filling then
    filling()
  end
end

--- The status request's answer as Markdown.
local function described(status)
  local lines = { ("**%s** %s"):format(status.state, status.message), "" }
  local function add(...)
    table.insert(lines, (...):format(select(2, ...)))
  end
  if type(status.model) == "table" and status.model.parameters > 0 then
    add("- %.1f M parameters", status.model.parameters / 1e6)
  end
  local requests = status.requests
  add("- asked %d times, shown %d, accepted %d", requests.asked, requests.shown, requests.accepted)
  if type(status.last.cost) == "table" then
    local cost = status.last.cost
    add("- last prompt: %d tokens computed, %d reused, %d written", cost.computed_tokens, cost.cached_tokens, cost.new_tokens)
  end
  if status.last.reason ~= "" then
    add("- nothing shown last time: %s", status.last.reason)
  end
  if type(status.action) == "table" and status.action.reason ~= "" then
    add("- %s: %s", vim.trim(status.action.title), status.action.reason)
  end
  for _, problem in ipairs(status.problems) do
    add("- problem: %s", problem)
  end
  return lines
end

local function status()
  local here = vim.api.nvim_get_current_buf()
  server.awaited()
  server.request("deepseek/status", nil, function(error, answer)
    local buffer = vim.api.nvim_create_buf(false, true)
    local lines = error and { "**not running** " .. error.message } or described(answer)
    vim.api.nvim_buf_set_lines(buffer, 0, -1, false, lines)
    vim.bo[buffer].filetype, vim.bo[buffer].modifiable = "markdown", false
    windows.open(buffer, "deepseek-lsp", "q closes")
  end, here)
end

local function log()
  vim.cmd.tabedit(vim.fn.fnameescape(vim.lsp.get_log_path and vim.lsp.get_log_path() or vim.lsp.log.get_filename()))
end

--- Completes an action's name by those that fit at the cursor, or in the range.
local function names(typed, line)
  local first, last = line:match("^%s*(%d+),(%d+)")
  if line:match("^%s*'<,'>") then
    first, last = vim.fn.line("'<"), vim.fn.line("'>")
  end
  if line:match("Deepseek%a+!?%s+%S+%s") then
    return {} -- what follows the name are the user's words
  end
  local found = vim.tbl_keys(offered(places.here(tonumber(first), tonumber(last))))
  table.sort(found)
  return vim.tbl_filter(function(name)
    return vim.startswith(name, typed)
  end, found)
end

local RANGE = { range = true }

---@type { [1]: string, [2]: function, [3]: string, [4]: table? }[]
M.list = {
  { "DeepseekExplain", explain, "Explain the function here, or the range", RANGE },
  { "DeepseekTests", simply("tests"), "Write tests for the function here", RANGE },
  { "DeepseekFix", fix, "Fix what is reported here", RANGE },
  { "DeepseekDocument", simply("docstring"), "Document the function here", RANGE },
  { "DeepseekAction", any, "Any action by its name, or a menu", { range = true, nargs = "*", complete = names } },
  { "DeepseekFill", fill, "Write at the end of this line, or into the range's <fill> marks", { range = true, nargs = "*" } },
  { "DeepseekChat", talk, "Talk with the model; with ! a new conversation", { range = true, nargs = "*", bang = true } },
  { "DeepseekStop", stop, "Stop what the model is writing" },
  { "DeepseekStatus", status, "What deepseek-lsp runs, and why nothing was shown" },
  { "DeepseekToggle", function() require("deepseek_lsp").toggle() end, "Switch ghost text on or off" },
  { "DeepseekRestart", server.restart, "Stop the server and start it again" },
  { "DeepseekLog", log, "Open the log of Neovim's language clients" },
}

function M.define()
  for _, command in ipairs(M.list) do
    local name, what, description, options = unpack(command)
    vim.api.nvim_create_user_command(name, what, vim.tbl_extend("force", options or {}, { desc = description }))
  end
end

return M
