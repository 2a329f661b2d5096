-- May this call run? Mirrors rules/admission.py: everything is decided in one step, all or nothing.
-- Its keys: hold, account, counters, idempotency key, charge keys, then what the sources name.
-- Its words: numbers and what is rare, limits, sources, how the hold goes on after its parts with nothing rare in it.
-- Answers 'A' and what it took, 'J' and whose key it joined, or {'R', rows} if it may not run: why, the rules say from
-- these rows. Answers nothing, and why, if it could not be decided here.

-- -- what is asked ------------------------------------------------------------------------------------------

-- Of most calls: no slots, no charge key, no idempotency key.
local NOTHING_RARE = { leases = {}, charge = 0, key = false }

function M.rare_of(text, at, extra)
  local pools, charge, span, claim, life, fingerprint = parse('>I4c0BI4c0BdI4c0', text, at)
  local rare = {
    leases = {}, charge = charge, span = span, charge_at = extra + claim, key = claim == 1 and keys[extra], life = life,
    fingerprint = fingerprint,
  }
  local place = 1
  while place <= #pools do
    local pool = {}
    pool.key, pool.limit, place = parse('>I4c0d', pools, place)
    rare.leases[#rare.leases + 1] = pool
  end
  return rare
end

-- A call with anything beside limits and the caller's own wallet.
function M.ask_of(k, a, n_keys, at)
  local numbers = args[a]
  local amount, minimum, ttl, grace, at_rare = parse('>dddd', numbers, at)
  local limits, sources = limits_of(args[a + 1]), sources_of(args[a + 2])
  local who, _, at_kept = parse('>I4c0I4', args[a + 3])
  return {
    k = k, n_keys = n_keys, base = k + n_keys - sources.keys, account = rest(keys[k + 2]), amount = amount,
    minimum = minimum, ttl = ttl, grace = grace, limits = limits, sources = sources, who = who,
    kept = sub(args[a + 3], at_kept),
    rare = at_rare <= #numbers and M.rare_of(numbers, at_rare, k + 3 + #limits) or NOTHING_RARE,
    -- What is found out: when, how many leases live, what else was read, who pays.
    now = 0, counts = {}, further = NONE, key = false, book = false, giving = false,
  }
end

-- What the rules need to say why: all rows of the call as they are now, and how many leases of each pool live.
function M.refused(k, n_keys, now, counts, further)
  local found = {}
  for i = 1, n_keys do
    local key = keys[k + i]
    local account = match(key, '^a:(.*)$', #prefix + 1)
    local book = account and books[account]
    found[i] = book and (book.is_moved or book.is_due_new) and (M.book_text(book)) or rows[key]
  end
  return { 'R', pack('>d', now), counts, found, further }
end

-- -- what may forbid it -------------------------------------------------------------------------------------

-- Looks at the calls of an account that are overdue: none is, or the rules have to end them.
function M.is_due(book, now)
  if book.due > now then
    return nil
  end
  if live[book.account] or ended_live[book.account] then
    return CODE.LATER
  end
  local first = call('ZRANGE', prefix .. 'l:' .. book.account, 0, 0, 'WITHSCORES')
  if first[2] and tonumber(first[2]) <= now then
    return CODE.RULES
  end
  book.due = tonumber(first[2] or 'inf')
  book.is_due_new = true
end

-- The call's time, that none of its accounts has seen a later one than. Returns why it cannot be decided, if so.
function M.come_to_now(ask)
  local own, sources = book_of(ask.account), ask.sources
  local now = max(now_is, own.seen)
  if not sources.is_plain then
    for _, source in ipairs(sources) do
      now = max(now, book_of(M.account_of(ask, source)).seen)
    end
    for _, source in ipairs(sources) do
      local why = M.is_due(book_of(M.account_of(ask, source)), now)
      if why then
        return why
      end
    end
  end
  ask.now = now
  return M.is_due(own, now)
end

-- Whether the idempotency key belongs to another request, or to one that runs.
function M.is_claimed(ask)
  local row = ask.rare.key and rows[ask.rare.key]
  if not row then
    return false
  end
  local expires, holder, _, _, _, at_receipt = parse(AS.IDEMPOTENCY, row)
  return at_receipt > #row or (holder ~= '' and expires > ask.now)
end

function M.has_slots(ask)
  local has = true
  for i, pool in ipairs(ask.rare.leases) do
    ask.counts[i] = M.live_leases(pool.key, ask.now)
    has = has and ask.counts[i] < pool.limit
  end
  return has
end

-- The row of a charge key and its text after a call has joined it; or its window, for the call that begins it. Nothing
-- where its calendar does not cover now.
function M.by_key(ask)
  local rare, now = ask.rare, ask.now
  local bounds, at, start, finish = M.doubles_of(rare.span), rare.charge_at, now, nil
  if rare.charge == CODE.CALENDAR then
    local index
    index, start, finish = M.pick(bounds, now)
    if not index then
      return nil
    end
    at = at + index - 1
  else
    finish = now + bounds[1]
  end
  local key = keys[at]
  local known = rows[key]
  if known then
    local k_start, k_end, members, settled, place = parse(AS.CHARGE_KEY, known)
    local is_settled = settled == 1 and (rare.charge == CODE.CALENDAR or now < k_end)
    if is_settled or (settled == 0 and members > 0) then
      local hold = sub(known, place)
      return {
        key = key, text = pack(AS.CHARGE_KEY, k_start, k_end, members + 1, settled) .. hold,
        hold = prefix .. 'h:' .. hold,
      }
    end
  end
  return { key = key, start = start, finish = finish }
end

-- Finds who pays. False if nobody does; nothing, and why, if that could not be decided here.
function M.is_paid(ask)
  if ask.rare.charge > 0 then
    ask.key = M.by_key(ask) or false
    if not ask.key or ask.key.text then
      return ask.key and true
    end
    if fetch(keys[ask.k + 1] .. ':key') then
      -- An id that comes again long after: what it left behind has to go first.
      return nil, CODE.RULES
    end
  end
  local book, giving = M.first_group(ask, ask.sources)
  if not book then
    if giving then
      return nil, giving
    end
    return false
  end
  if not M.is_exact(book, ask.amount) then
    M.forget(book)
    return nil, CODE.RULES
  end
  ask.book, ask.giving = book, giving
  return true
end

-- -- taking -------------------------------------------------------------------------------------------------

-- How a hold goes on after its parts.
function M.kept_of(who, rare, kept)
  return pack('>I4', #who) .. who .. pack('>I4', #rare) .. rare .. kept
end

local function hold_text(now, ttl, grace, expires, due_at, parts, held, kept)
  local size = NEW_HOLD_SIZE + #parts + #kept
  return pack(AS_NEW_HOLD, size, 0, expires, due_at, 0, held, now, ttl, grace, #parts) .. parts .. kept
end

-- The hold of a call with nothing rare but pinned windows. `who`, unless that is empty, pays instead of the caller.
local function keep_hold(key, account, now, ttl, grace, parts, held, kept, who)
  if pinned ~= '' or who ~= '' then
    local caller, _, at = parse('>I4c0I4', kept)
    local rare = pinned == '' and '' or pack(AS.RARE, #pinned, pinned, 0, '', 0, '', 0, '')
    kept = M.kept_of(who ~= '' and who or caller, rare, sub(kept, at))
  end
  local expires = now + ttl
  put(key, hold_text(now, ttl, grace, expires, expires + grace, parts, held, kept))
  lives(account, expires, rest(key))
end

-- The hold that a charge key owns has no deadline: it ends with its calls, and each of those has one.
function M.begin_key(ask, parts, held)
  local key, owned = ask.key, keys[ask.k + 1] .. ':key'
  local member = rest(owned)
  local kept = M.kept_of(ask.who, '', ask.kept)
  put(owned, hold_text(ask.now, ask.ttl, ask.grace, CODE.INF, CODE.INF, parts, held, kept))
  put(key.key, pack(AS.CHARGE_KEY, key.start, key.finish, 1, 0) .. member)
  append(rare_of('past'), 'charge', key.finish, key.key)
  lives((parse('>I4c0', ask.who)), CODE.INF, member)
end

function M.join_key(ask)
  local owned = fetch(ask.key.hold)
  if owned then
    ask.who = select(11, parse(AS.HOLD, owned))
  end
  put(ask.key.key, ask.key.text)
end

-- Slots and the idempotency key are taken; what of all that is rare the hold keeps.
function M.take_rare(ask, member, expires)
  local rare, pools, its_key = ask.rare, '', ''
  for _, pool in ipairs(rare.leases) do
    M.lease(pool.key, member, expires)
    local name = rest(pool.key)
    pools = pools .. pack('>I4c0', #name, name)
  end
  if rare.key then
    local until_then, fingerprint = ask.now + rare.life, rare.fingerprint
    put(rare.key, pack(AS.IDEMPOTENCY, until_then, #member, member, #fingerprint, fingerprint, 0, '', 0, ''))
    append(rare_of('past'), 'idempotency', until_then, rare.key)
    its_key = rest(rare.key)
  end
  local charge_key = ask.key and rest(ask.key.key) or ''
  if pinned == '' and pools == '' and charge_key == '' and its_key == '' then
    return ''
  end
  return pack(AS.RARE, #pinned, pinned, #pools, pools, #charge_key, charge_key, #its_key, its_key)
end

-- Takes everything, and returns the answer.
function M.take_all(ask)
  local now, k, expires = ask.now, ask.k, ask.now + ask.ttl
  local parts, held, left_there, last = '', 0, 0, 0
  if ask.book then
    parts, held, left_there, last = M.take(ask, ask.book, ask.giving)
    M.close_book(ask.book, expires)
    local who = ask.sources[last].who
    ask.who = who ~= '' and who or ask.who
  end
  local whole = held
  if ask.key then
    if ask.key.text then
      M.join_key(ask)
    else
      M.begin_key(ask, parts, held)
    end
    parts, whole = '', 0
  end
  local key = keys[k + 1]
  local member = rest(key)
  local rare = M.take_rare(ask, member, expires)
  if ask.book or ask.key or rare ~= '' then
    local due_at = expires + ask.grace
    local kept = M.kept_of(ask.who, rare, ask.kept)
    put(key, hold_text(now, ask.ttl, ask.grace, expires, due_at, parts, whole, kept))
    lives((parse('>I4c0', ask.who)), expires, member)
  end
  if ask.key and ask.key.text then
    return take_counts(ask.limits, k, pack('>cdI4c0', 'J', now, #ask.who, ask.who))
  end
  return take_counts(ask.limits, k, pack('>cdddB', 'A', now, held, left_there, last))
end

local function admit_any(ask)
  local why = M.come_to_now(ask)
  if why then
    return nil, why
  end
  local now = ask.now
  if M.is_claimed(ask) then
    return M.refused(ask.k, ask.n_keys, now, ask.counts, ask.further)
  end
  local fits
  fits, why = count_all(ask.limits, ask.k, now)
  if fits == nil then
    return nil, why
  end
  if not M.has_slots(ask) or not fits then
    return M.refused(ask.k, ask.n_keys, now, ask.counts, ask.further)
  end
  if #ask.sources > 0 or ask.amount > 0 then
    local is_paid
    is_paid, why = M.is_paid(ask)
    if is_paid == nil then
      return nil, why
    end
    if not is_paid then
      return M.refused(ask.k, ask.n_keys, now, ask.counts, ask.further)
    end
  end
  return M.take_all(ask)
end

-- The same for limits and the wallet of whoever calls, where that has one grant and its `row` is to be changed as a
-- text: sets the amount aside as book_hold and close_book do. False, and nothing is changed, if it takes a book.
local function admit_row(k, a, n_keys, account, row, limits, wallet, amount, minimum, ttl, grace)
  local granted, settled, held, expired, debt, entries, change, due, seen, size, priority, begins, ends, number, g_settled,
    g_held, g_expired, begun, reversed, id, others, at = parse(AS_BOOK, row)
  local now = now_is < seen and seen or now_is
  if at <= #row or change <= now or due <= now then
    return false
  end
  local fits, why = count_all(limits, k, now)
  if fits == nil then
    return nil, why
  end
  local left = granted - settled - expired - held
  local some = left + wallet.limit
  some = some < amount and some or amount
  if not fits or some < minimum then
    return M.refused(k, n_keys, now, NONE, NONE)
  end
  local is_enough = begun == 1 and ends > now and size - g_settled - g_held - g_expired - reversed >= some
  if some <= 0 or not is_enough or max(granted, settled + held, expired, debt) + amount > MAX_AMOUNT then
    return false
  end
  local expires = now + ttl
  put(keys[k + 2], pack(
    AS_BOOK, granted, settled, held + some, expired, debt, entries, change, expires < due and expires or due, now, size,
    priority, begins, ends, number, g_settled, g_held + some, g_expired, begun, reversed, #id, id, #others, others
  ))
  local parts = pack(AS_PART, FROM_GRANT, 0, some, #id, id)
  keep_hold(keys[k + 1], account, now, ttl, grace, parts, some, args[a + 3], wallet.who)
  return take_counts(limits, k, pack('>cdddB', 'A', now, some, left - some, 1))
end

-- The same for what most calls are: limits, and at most one source, the wallet of whoever calls.
local function admit_plain(k, a, n_keys, limits, wallet, amount, minimum, ttl, grace)
  local account_key = keys[k + 2]
  local account = rest(account_key)
  local row = wallet and not books[account] and plain_row(account_key)
  if row then
    local reply, why = admit_row(k, a, n_keys, account, row, limits, wallet, amount, minimum, ttl, grace)
    if reply ~= false then
      return reply, why
    end
  end
  local book = book_of(account, account_key)
  local now = max(now_is, book.seen)
  local why = book.due <= now and M.is_due(book, now)
  if why then
    return nil, why
  end
  local fits
  fits, why = count_all(limits, k, now)
  if fits == nil then
    return nil, why
  end
  if not fits then
    return M.refused(k, n_keys, now, NONE, NONE)
  end
  local held, left_there, parts = 0, 0, ''
  if wallet then
    book = M.book_at(account, now)
    if not book then
      return nil, CODE.LATER
    end
    held = min(amount, available(book) + wallet.limit)
    if held < minimum then
      M.forget(book)
      return M.refused(k, n_keys, now, NONE, NONE)
    end
    if not M.is_exact(book, amount) then
      M.forget(book)
      return nil, CODE.RULES
    end
    parts = M.book_hold(book, held)
    M.close_book(book, now + ttl)
    left_there = available(book)
  end
  if wallet or pinned ~= '' then
    keep_hold(keys[k + 1], account, now, ttl, grace, parts, held, args[a + 3], wallet and wallet.who or '')
  end
  return take_counts(limits, k, pack('>cdddB', 'A', now, held, left_there, wallet and 1 or 0))
end

function M.admit(k, a, n_keys, at)
  if rows[keys[k + 1]] then
    -- The same id again: the reply was lost, not the decision.
    return nil, CODE.RULES
  end
  local numbers, sources = args[a], sources_of(args[a + 2])
  local amount, minimum, ttl, grace, at_rare = parse('>dddd', numbers, at)
  local wallet = sources[1]
  if at_rare > #numbers and sources.is_plain and (wallet or amount == 0) then
    return admit_plain(k, a, n_keys, limits_of(args[a + 1]), wallet, amount, minimum, ttl, grace)
  end
  return admit_any(M.ask_of(k, a, n_keys, at))
end
