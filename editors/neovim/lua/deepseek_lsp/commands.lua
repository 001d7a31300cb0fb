--- What the user commands do; plugin/deepseek_lsp.lua names them.

local server = require("deepseek_lsp.server")
local window = require("deepseek_lsp.window")

local M = {}

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
  for _, problem in ipairs(status.problems) do
    add("- problem: %s", problem)
  end
  return lines
end

function M.status()
  server.request("deepseek/status", nil, function(error, status)
    window.open("deepseek-lsp", error and { "**not running** " .. error.message } or described(status))
  end)
end

function M.log()
  vim.cmd.tabedit(vim.fn.fnameescape(vim.lsp.get_log_path and vim.lsp.get_log_path() or vim.lsp.log.get_filename()))
end

return M
