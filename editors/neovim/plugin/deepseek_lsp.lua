local function command(name, module, what, description)
  vim.api.nvim_create_user_command(name, function()
    require(module)[what]()
  end, { desc = description })
end

command("DeepseekStatus", "deepseek_lsp.commands", "status", "What deepseek-lsp runs, and why nothing was shown")
command("DeepseekLog", "deepseek_lsp.commands", "log", "Open the log of Neovim's language clients")
command("DeepseekToggle", "deepseek_lsp", "toggle", "Switch ghost text on or off")
command("DeepseekRestart", "deepseek_lsp.server", "restart", "Stop the server and start it again")
