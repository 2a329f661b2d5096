-- A part of a call whose hold is in another slot: keep it, end it, or take it back. See stores/redis/parts.py.
-- Its key: hold. Its word: what to do, life, grace, then what was used by meter. Answers 1, or 0 for a part that is none.
CODE.KEEP, CODE.END, CODE.TAKE_BACK, CODE.UNDO = 0, 1, 2, 3
CODE.PLAIN = 'requests'

-- Of whatever meter, nothing was used.
local NOTHING_USED = setmetatable({}, { __index = function() return 0 end })

function M.is_weighted(windows)
  local at = 1
  while at <= #windows do
    local _, _, meter, _, next_at = parse(AS.PINNED, windows, at)
    if sub(meter, 2) ~= CODE.PLAIN then
      return true
    end
    at = next_at
  end
  return false
end

-- A window that the part has begun has not begun if nobody else counts in it: refusals leave no trace.
function M.drop_unused(windows)
  local at = 1
  while at <= #windows do
    local _, _, meter, counter, next_at = parse(AS.PINNED, windows, at)
    local key = prefix .. 'c:' .. counter
    local text = sub(meter, 1, 1) == CODE.BEGUN and M.fetch(key)
    if text then
      local _, _, used, previous = parse(AS.WINDOW, text)
      if used == 0 and previous == 0 then
        M.drop(key, 'counters')
      end
    end
    at = next_at
  end
end

function M.keep_part(key, text, pools, ttl, grace)
  local size, state, expires, _, observed, held, created, _, _, _, who = parse(AS.HOLD, text)
  local member = M.rest(key)
  -- From a reservation's life to the call's own, which may be shorter; kept again it only lives longer.
  expires = observed == 1 and max(now_is + ttl, expires) or now_is + ttl
  M.put(key, pack('>I4Bddddddd', size, state, expires, expires + grace, 1, held, created, ttl, grace) .. sub(text, 62))
  M.lives(parse('>I4c0', who), expires, member)
  for _, pool in ipairs(pools) do
    M.lease(prefix .. 'q:' .. pool, member, expires)
  end
end

function M.account_of_part(text)
  local account = parse('>I4c0', (select(11, parse(AS.HOLD, text))))
  return account
end

function M.drop_part(key, text)
  M.drop(key, 'ended')
  M.lives_no_more(M.account_of_part(text), M.rest(key))
end

function M.part(k, a, _, at)
  local key, numbers = keys[k + 1], args[a]
  local text = rows[key]
  if not text then
    return 0
  end
  local what, ttl, grace, from = parse('>Bdd', numbers, at)
  local size, _, expires, _, _, _, _, _, _, _, _, rare = parse(AS.HOLD, text)
  if size < #text or (what == CODE.KEEP and expires <= now_is) then
    return 0
  end
  local windows, pools_text, _, claimed = parse(AS.RARE, rare)
  local pools = M.texts_of(pools_text)
  if what == CODE.KEEP then
    M.keep_part(key, text, pools, ttl, grace)
    if #pools == 0 and claimed == '' and not M.is_weighted(windows) then
      -- What was counted stays, and nothing of it is ever corrected: the part is only for whoever repeats the call soon.
      M.lives_no_more(M.account_of_part(text), M.rest(key))
      M.push(work.fading, key, string.format('%.0f', 1000 * ttl))
    end
    return 1
  end
  local actual = NOTHING_USED
  if what == CODE.END then
    actual = {}
    while from <= #numbers do
      local meter, used
      meter, used, from = parse('>I4c0d', numbers, from)
      actual[CODE.COUNTED .. meter], actual[CODE.BEGUN .. meter] = used, used
    end
  elseif claimed ~= '' then
    M.answer_key(prefix .. 'i:' .. claimed, M.rest(key))
  end
  M.correct(windows, actual, now_is)
  if what == CODE.TAKE_BACK then
    M.drop_unused(windows)
  end
  for _, pool in ipairs(pools) do
    M.lease(prefix .. 'q:' .. pool, M.rest(key), false)
  end
  M.drop_part(key, text)
  return 1
end
