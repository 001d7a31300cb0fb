--- :checkhealth deepseek_lsp

local server = require("deepseek_lsp.server")
local M = {}

local function neovim(health)
  if vim.lsp.inline_completion then
    health.ok("Neovim " .. tostring(vim.version()) .. ": ghost text is Neovim's own")
  elseif vim.fn.has("nvim-0.10") == 1 then
    health.ok("Neovim " .. tostring(vim.version()) .. ": ghost text is this plugin's own")
  else
    health.error("Neovim 0.10 or newer is needed")
  end
end

--- What the windows of explain and chat need.
local function windows(health)
  if pcall(vim.treesitter.get_string_parser, "", "markdown") then
    health.ok("Explanations and the chat are shown as Markdown")
  else
    health.warn("Neovim has no parser for Markdown: explanations and the chat are shown without colours", {
      "It comes with Neovim's own builds; some distributions package it apart.",
    })
  end
end

--- Who answers commands such as :DeepseekExplain, and :DeepseekChat.
local function answers(health, status)
  if not status.settings.actions.enabled then
    health.warn("Actions and the chat are switched off", { "actions.enabled is false in the settings." })
  elseif status.settings.chat_model ~= "" then
    health.ok("Actions and the chat are answered by " .. status.settings.chat_model)
  elseif type(status.model) == "table" and type(status.model.without_chat) == "string" then
    health.info("Actions and the chat: " .. status.model.without_chat)
  else
    health.ok("Actions and the chat are answered by the model that completes")
  end
end

local function command(health, cmd)
  if vim.fn.executable(cmd[1]) == 0 then
    health.error(cmd[1] .. " is not found", {
      "Install it: pip install deepseek-lsp (or pipx, uv tool), and put it on PATH.",
      "Or name it: require('deepseek_lsp').setup({ cmd = { '/path/to/deepseek-lsp' } })",
    })
    return
  end
  local ran = vim.system({ cmd[1], "--version" }, { text = true }):wait(20000)
  if ran.code == 0 then
    health.ok(vim.fn.exepath(cmd[1]) .. ": " .. vim.trim(ran.stdout))
  else
    health.error(cmd[1] .. " --version fails", vim.split(vim.trim(ran.stderr), "\n"))
  end
end

local function running(health)
  local client = server.client()
  if not client then
    health.warn("No server is running", { "Open a file of one of the filetypes given to setup()." })
    return
  end
  local status, problem
  server.request("deepseek/status", nil, function(error, result)
    status, problem = result, error
  end)
  vim.wait(5000, function()
    return status or problem
  end, 20)
  if not status then
    health.error("The server does not answer: " .. (problem and problem.message or "nothing came within 5 s"))
    return
  end
  local say = { ready = health.ok, failed = health.error }
  local tell = say[status.state] or health.info
  tell(("The server is %s. %s"):format(status.state, status.message))
  answers(health, status)
  for _, found in ipairs(status.problems) do
    health.warn(found)
  end
  if status.last.reason ~= "" then
    health.info("Last time nothing was shown: " .. status.last.reason)
  end
end

function M.check()
  vim.health.start("deepseek-lsp")
  neovim(vim.health)
  windows(vim.health)
  local cmd = server.command()
  if not cmd then
    vim.health.warn("require('deepseek_lsp').setup() was not called", { "See :help deepseek-lsp-setup" })
    return
  end
  command(vim.health, cmd)
  running(vim.health)
end

return M
