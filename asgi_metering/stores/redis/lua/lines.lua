-- Ledger lines above a number. KEYS: checkpoint, lines. ARGV: number, how many.
local checkpoint = call('GET', KEYS[1])
local folded = checkpoint and tonumber(match(checkpoint, '^%d+')) or 0
local from = math.max(0, tonumber(ARGV[1]) - folded)
return { call('TIME'), call('LRANGE', KEYS[2], from, from + tonumber(ARGV[2]) - 1) }
