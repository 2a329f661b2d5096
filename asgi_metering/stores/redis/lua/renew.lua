-- A heartbeat. Mirrors renew in rules/settlement.py. Its key: hold. Its word: what was observed.
-- Answers 1, or 0 for a hold that does not live.
local function renew(k, a)
  local key = KEYS[k + 1]
  local text = rows[key]
  if not text then
    return 0
  end
  local state, mark, expires, _, observed, _, _, ttl, grace, _, who, rare = parse(HOLD, text)
  if state >= SETTLED then
    return 0
  end
  expires = max(now_is + ttl, expires)
  observed = max(observed, (parse('>d', ARGV[a + 1])))
  put(key, pack('>BBddd', state, mark, expires, expires + grace, observed) .. sub(text, 27))
  local member = account_at(key)
  lives(parse('>I4c0', who), expires, member)
  if rare ~= '' then
    local _, pools_text = parse(RARE, rare)
    for _, pool in ipairs(texts_of(pools_text)) do
      lease(prefix .. 'q:' .. pool, member, expires)
    end
  end
  return 1
end
