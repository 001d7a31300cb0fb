--- What the user is told about the server: loading, ready, busy, off or error, and why.

local M = { enabled = false }

local now = { kind = "off", detail = "No buffer with a server yet." }
local percent = 0
local servers = 0 -- so many were there; what one that is gone still says does not count
local asking = {} -- what the server was asked for and has not answered yet, by client and id
local working = {} -- what it does without saying how far it is, such as an answer, by token

local function redraw()
  vim.cmd("redrawstatus!")
end

local function set(kind, detail)
  now = { kind = kind, detail = detail }
  redraw()
end

function M.set_enabled(enabled)
  M.enabled = enabled
  redraw()
end

--- The server that was there is gone.
local function gone()
  servers, percent, asking, working = servers + 1, 0, {}, {}
end

function M.failed(why)
  gone()
  set("error", why)
end

function M.starting(how)
  gone()
  set("loading", how)
end

function M.stopped(why)
  gone()
  set("off", why)
end

--- loading, ready, busy, off or error
function M.kind()
  if not M.enabled and now.kind == "ready" then
    return "off"
  end
  return now.kind == "ready" and (next(asking) or next(working)) and "busy" or now.kind
end

function M.detail()
  return M.kind() == "off" and now.kind == "ready" and "Ghost text is switched off: :DeepseekToggle." or now.detail
end

function M.short()
  local kind = M.kind()
  return "deepseek " .. (kind == "loading" and percent .. "%%" or kind)
end

local KINDS = { waiting = "loading", loading = "loading", ready = "ready", failed = "error", disabled = "off" }

--- Asks the server how it stands.
function M.refresh()
  local asked = servers
  require("deepseek_lsp.server").request("deepseek/status", nil, function(error, status)
    if asked ~= servers then
      return
    end
    if error then
      set("error", error.message)
    else
      set(KINDS[status.state] or "error", status.message)
    end
  end)
end

local ASKED = { ["textDocument/inlineCompletion"] = true, ["deepseek/chat"] = true, ["workspace/executeCommand"] = true }

--- Follows the server by what it and Neovim say about it.
function M.watch()
  local name = require("deepseek_lsp.server").name
  local group = vim.api.nvim_create_augroup("deepseek_lsp.state", {})
  local function on(event, heard)
    vim.api.nvim_create_autocmd(event, {
      group = group,
      callback = function(args)
        local client = vim.lsp.get_client_by_id(args.data.client_id)
        if client and client.name == name then
          heard(args.data)
        end
      end,
    })
  end
  on("LspAttach", M.refresh)
  on("LspProgress", function(data)
    local token, value = data.params.token, data.params.value
    if value.kind == "end" then
      working[token] = nil
      M.refresh()
    elseif value.percentage then
      working[token], percent = nil, value.percentage
      set("loading", value.message or value.title)
    elseif value.kind == "begin" then
      working[token] = true
      redraw()
    end
  end)
  on("LspRequest", function(data)
    if ASKED[data.request.method] then
      asking[data.client_id .. ":" .. data.request_id] = data.request.type == "pending" or nil
      redraw()
    end
  end)
end

return M
