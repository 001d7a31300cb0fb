--- deepseek-lsp in Neovim. `setup` starts the server and shows its ghost text; the rest is for mappings and the statusline.

local server = require("deepseek_lsp.server")
local state = require("deepseek_lsp.state")

local M = {}

---@class deepseek_lsp.Options
local defaults = {
  cmd = { "deepseek-lsp" },
  root_markers = { ".git" },
  --- The server's settings, such as { model = "...", inline = { max_lines = 3 } }.
  settings = {},
  --- Insert-mode mappings; false leaves one out.
  keys = { accept = "<Tab>", accept_word = "<M-w>", accept_line = "<M-l>" },
  filetypes = {
    "bash", "c", "cpp", "cs", "css", "go", "html", "java", "javascript", "javascriptreact", "json", "kotlin", "lua", "make",
    "markdown", "php", "python", "ruby", "rust", "scala", "sh", "sql", "swift", "toml", "typescript", "typescriptreact", "vim",
    "yaml",
  },
}

--- The ghost text: Neovim's own since 0.12, ours before.
local function ghost()
  return require(vim.lsp.inline_completion and "deepseek_lsp.native" or "deepseek_lsp.ghost")
end

--- Plugin managers make tags for the help in the repository's own `doc`, and ours lies deeper.
local function tag_help()
  local doc = vim.api.nvim_get_runtime_file("doc/deepseek-lsp.txt", false)[1]
  if doc and vim.fn.getftime(vim.fs.dirname(doc) .. "/tags") < vim.fn.getftime(doc) then
    pcall(vim.cmd.helptags, vim.fs.dirname(doc)) -- where we may not write there is no help
  end
end

---@param options? table changes to the defaults
function M.setup(options)
  options = vim.tbl_deep_extend("force", defaults, options or {})
  tag_help()
  require("deepseek_lsp.commands").define()
  state.watch()
  server.start(options)
  M.enable(true)
  local keys = require("deepseek_lsp.keys")
  keys.map(options.keys.accept, M.accept, "Accept the suggestion")
  keys.map(options.keys.accept_word, M.accept_word, "Accept the suggestion's next word")
  keys.map(options.keys.accept_line, M.accept_line, "Accept the suggestion's next line")
end

--- Shows ghost text, or stops showing it.
function M.enable(enable)
  ghost().enable(enable)
  state.set_enabled(enable)
end

function M.toggle()
  M.enable(not state.enabled)
  vim.notify("deepseek-lsp: ghost text is " .. (state.enabled and "on" or "off"))
end

--- These take the suggestion, or a part of it, and say whether there was one.
function M.accept()
  return ghost().accept("all")
end

function M.accept_word()
  return ghost().accept("word")
end

function M.accept_line()
  return ghost().accept("line")
end

--- How it stands, in a word or two for a statusline: `deepseek ready`, `deepseek 40%%`, `deepseek off`.
--- For 'statusline' as %{%v:lua.require'deepseek_lsp'.statusline()%}.
function M.statusline()
  return state.short()
end

return M
