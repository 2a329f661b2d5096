-- One account whole. KEYS: account, closed grants, live holds, windows, checkpoint. ARGV: prefix of holds, prefix of windows.
local function texts(ids, prefix)
  local found = {}
  for i, id in ipairs(ids) do
    found[2 * i - 1] = prefix .. id
    found[2 * i] = call('GET', prefix .. id)
  end
  return found
end

return {
  call('TIME'),
  call('GET', KEYS[1]),
  call('HVALS', KEYS[2]),
  texts(call('ZRANGE', KEYS[3], 0, -1), ARGV[1]),
  texts(call('SMEMBERS', KEYS[4]), ARGV[2]),
  call('GET', KEYS[5]),
}
