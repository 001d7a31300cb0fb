--- The server's process: what Neovim is told to start, and starting it again after a crash.

local state = require("deepseek_lsp.state")

local M = { name = "deepseek_lsp" }

local RESTARTS = 5
local FIRST_WAIT_MS = 1000
local CALM_MS = 60000
local INITIALIZE_MS = 5000
local LANGUAGES = { bash = "shellscript", sh = "shellscript", cs = "csharp", make = "makefile" }

local crashes, restarting = 0, false
local initializing, ready_at = false, nil
local waiting = 0 -- counts the waits for a new start; one that was overtaken starts nothing
local config

--- Neovim's config of the server.
local function config_of(options)
  local capabilities = vim.lsp.protocol.make_client_capabilities()
  capabilities.general.positionEncodings = { "utf-8" } -- characters are bytes then, as in Neovim
  capabilities.textDocument.inlineCompletion = { dynamicRegistration = false }
  capabilities.textDocument.codeAction.resolveSupport = { properties = { "command" } } -- changes come by `action`, which shows them first
  capabilities.workspace.workspaceEdit.documentChanges = true
  capabilities.workspace.workspaceEdit.changeAnnotationSupport = { groupsOnLabel = true }
  capabilities.experimental = { deepseekLsp = { stream = true, input = true, newlines = true } }
  local function chosen(...)
    require("deepseek_lsp.action").chosen(...)
  end
  return {
    name = M.name,
    cmd = options.cmd,
    filetypes = options.filetypes,
    root_markers = options.root_markers,
    capabilities = capabilities,
    commands = { ["deepseek-lsp.run"] = chosen, ["deepseek-lsp.input"] = chosen },
    handlers = {
      ["deepseek/stream"] = function(...)
        require("deepseek_lsp.stream").heard(...)
      end,
    },
    init_options = vim.tbl_isempty(options.settings) and vim.empty_dict() or options.settings,
    get_language_id = function(_, filetype)
      return LANGUAGES[filetype] or filetype
    end,
    before_init = function()
      initializing = true
      state.starting("The server is started.")
    end,
    on_init = function()
      initializing, ready_at = false, vim.uv.now()
    end,
    on_exit = function(code, signal, client_id)
      vim.schedule(function() -- Neovim 0.10 forgets the client in what it schedules after this, so we come after that
        vim.schedule(function()
          require("deepseek_lsp.stream").lost(client_id)
          M.ended(code, signal)
        end)
      end)
    end,
  }
end

--- Neovim 0.10 has no list of servers to enable: a buffer of ours starts one or joins it.
local function start_in(buffer)
  if vim.api.nvim_buf_is_loaded(buffer) and vim.bo[buffer].buftype == "" and vim.list_contains(config.filetypes, vim.bo[buffer].filetype) then
    config.root_dir = vim.fs.root(buffer, config.root_markers)
    vim.lsp.start(config, { bufnr = buffer })
  end
end

local function start_everywhere()
  if vim.fn.executable(config.cmd[1]) == 0 then
    state.failed(config.cmd[1] .. " is not found: see :checkhealth deepseek_lsp")
    return
  end
  if vim.lsp.enable then
    vim.lsp.enable(M.name)
  else
    vim.tbl_map(start_in, vim.api.nvim_list_bufs())
  end
end

local function stop()
  if vim.lsp.enable then
    vim.lsp.enable(M.name, false)
  else
    vim.lsp.stop_client(vim.lsp.get_clients({ name = M.name }))
  end
end

function M.start(options)
  config = config_of(options)
  if vim.lsp.enable then
    vim.lsp.config(M.name, config)
  elseif vim.fn.executable(config.cmd[1]) == 1 then
    vim.api.nvim_create_autocmd("FileType", {
      group = vim.api.nvim_create_augroup("deepseek_lsp.start", {}),
      pattern = config.filetypes,
      callback = function(event)
        start_in(event.buf)
      end,
    })
  end
  start_everywhere()
end

--- What is started; nil before setup().
---@return string[]?
function M.command()
  return config and config.cmd
end

--- The server of a buffer; without one, any.
---@param buffer? integer
---@return vim.lsp.Client?
function M.client(buffer)
  return vim.lsp.get_clients({ name = M.name, bufnr = buffer })[1]
end

--- The same, for those who ask while the server is being started.
---@param buffer? integer
---@return vim.lsp.Client?
function M.awaited(buffer)
  vim.wait(INITIALIZE_MS, function()
    return not initializing
  end, 20)
  return M.client(buffer)
end

--- Why a buffer has none, and what to do.
function M.missing()
  local why = M.client() and "Its filetype is not one of those given to setup()." or state.detail()
  return ("No server is attached to this buffer. %s :checkhealth deepseek_lsp says more."):format(why)
end

local METHODS = vim.fn.has("nvim-0.11") == 1 -- before, what a client offers were functions without self

--- Calls `method` of a server, which knows the buffer as it is now; `heard(error, result)` is called on Neovim's loop.
---@return integer? request which `cancel` takes
function M.call(client, method, params, heard, buffer)
  local sent, request
  if METHODS then
    sent, request = client:request(method, params, heard, buffer)
  else
    sent, request = client.request(method, params, heard, buffer)
  end
  if not sent then
    vim.schedule(function()
      heard({ message = "The server is gone: " .. state.detail() })
    end)
  end
  return request
end

--- The answer at once, or nil where it does not come within `limit_ms`.
function M.call_now(client, method, params, limit_ms, buffer)
  local found
  if METHODS then
    found = client:request_sync(method, params, limit_ms, buffer)
  else
    found = client.request_sync(method, params, limit_ms, buffer)
  end
  return found and found.result
end

function M.cancel(client, request)
  if request and METHODS then
    client:cancel_request(request)
  elseif request then
    client.cancel_request(request)
  end
end

--- Calls `method` of the buffer's server, or of any where it has none; `heard(error, result)` is called on Neovim's loop.
---@param buffer? integer
function M.request(method, params, heard, buffer)
  local client = M.client(buffer) or M.client()
  if client then
    M.call(client, method, params, heard, buffer)
  else
    heard({ message = state.detail() }, nil)
  end
end

--- Ends the server and, once it is gone, starts it anew.
function M.restart()
  crashes, waiting = 0, waiting + 1
  restarting = M.client() ~= nil
  state.starting("The server is started again.")
  stop()
  if not restarting then
    start_everywhere()
  end
end

--- A server that went on its own is started again, each time after twice the wait, and after a few times no more.
function M.ended(code, signal)
  local ran_ms = ready_at and vim.uv.now() - ready_at or 0
  initializing, ready_at = false, nil
  if restarting then
    restarting = false
    start_everywhere()
    return
  end
  if code == 0 and (signal == 0 or signal == 15) or vim.v.exiting ~= vim.NIL then
    state.stopped("The server was stopped.")
    return
  end
  crashes = ran_ms > CALM_MS and 1 or crashes + 1
  local how = ("The server ended by itself (status %d, signal %d)"):format(code, signal)
  if crashes > RESTARTS then
    state.failed(how .. (", %d times; :DeepseekLog says why, :DeepseekRestart tries again."):format(crashes))
    local short = ("deepseek-lsp: the server ended %d times. :DeepseekLog, :DeepseekRestart"):format(crashes)
    vim.notify(short, vim.log.levels.ERROR)
    return
  end
  local wait_ms = FIRST_WAIT_MS * 2 ^ (crashes - 1)
  state.failed(how .. (" and is started again in %d s."):format(wait_ms / 1000))
  waiting = waiting + 1
  local mine = waiting
  vim.defer_fn(function()
    if mine == waiting then
      stop()
      start_everywhere()
    end
  end, wait_ms)
end

return M
