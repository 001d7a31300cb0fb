--- Insert-mode mappings that do what the key did before when there is nothing to accept.

local M = {}

---@param key string|false
---@param accept fun(): boolean
function M.map(key, accept, description)
  if not key then
    return
  end
  local before = vim.fn.maparg(key, "i", false, true)
  local otherwise = key
  if before.lhs and before.desc ~= description then
    otherwise = ("<Plug>(deepseek-before-%s)"):format(key:gsub("[<>]", ""))
    before.lhs, before.lhsraw, before.lhsrawalt = otherwise, vim.keycode(otherwise), nil
    vim.fn.mapset(before)
  end
  vim.keymap.set("i", key, function()
    return accept() and "" or otherwise
  end, { expr = true, remap = otherwise ~= key, desc = description })
end

return M
