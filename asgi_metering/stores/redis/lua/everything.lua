-- Everything of a namespace, as {key, type, content}. For proofs and tests. ARGV[1] is the pattern of its keys.
local READ = {
  string = { 'GET' },
  hash = { 'HGETALL' },
  list = { 'LRANGE', 0, -1 },
  set = { 'SMEMBERS' },
  zset = { 'ZRANGE', 0, -1, 'WITHSCORES' },
}
local found = { call('TIME') }
for _, key in ipairs(call('KEYS', ARGV[1])) do
  local kind = call('TYPE', key).ok
  local read = READ[kind]
  found[#found + 1] = { key, kind, call(read[1], key, unpack(read, 2)) }
end
return found
