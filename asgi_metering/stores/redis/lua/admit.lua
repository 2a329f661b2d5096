-- May this call run? Mirrors rules/admission.py: everything is decided in one step, all or nothing.
-- Its keys: hold, account, counters, idempotency key, charge keys, then what the sources name.
-- Its words: numbers and what is rare, limits, sources, who pays, what the hold keeps.
-- Answers 'A' and what it took, 'J' and whose key it joined, or {'R', rows} if it may not run: why, the rules say from
-- these rows. Answers nothing, and why, if it could not be decided here.

CODE.FIXED, CODE.CALENDAR, CODE.SLIDING = 0, 1, 2
CODE.A_WALLET, CODE.A_CALENDAR, CODE.A_ROLLING = 0, 1, 2

-- Limits and sources come again and again: each is read once, and remembered up to a bound.
local REMEMBERED = 1000
local known = { count = 0, limits = {}, sources = {} }

local function remember(kind, text, told)
  if known.count == REMEMBERED then
    known.count, known.limits, known.sources = 0, {}, {}
  end
  known.count = known.count + 1
  known[kind][text] = told
  return told
end

function M.limits_of(text)
  local limits = known.limits[text]
  if limits then
    return limits
  end
  limits = {}
  local at = 1
  while at <= #text do
    local limit, bounds = {}, nil
    limit.kind, limit.limit, limit.window, limit.cost, limit.meter, bounds, at = parse('>BdddI4c0I4c0', text, at)
    limit.bounds = M.doubles_of(bounds)
    limits[#limits + 1] = limit
  end
  return remember('limits', text, limits)
end

function M.sources_of(text)
  local sources = known.sources[text]
  if sources then
    return sources
  end
  sources = { keys = 0 }
  local at = 1
  while at <= #text do
    local kind, first, split, limit, account, own, who, name, span
    kind, first, split, limit, account, own, who, name, span, at = parse('>BBBdHHI4c0I4c0I4c0', text, at)
    local source = {
      kind = kind, first = first == 1, split = split == 1, limit = limit, account = account, own = own, who = who,
      name = name, span = M.doubles_of(span), index = #sources + 1,
    }
    sources[source.index] = source
    if source.account > 0 then
      sources.keys = max(sources.keys, source.account)
    end
    if source.kind ~= CODE.A_WALLET then
      sources.keys = max(sources.keys, source.own + (source.kind == CODE.A_CALENDAR and #source.span - 1 or 0))
    end
  end
  sources.is_plain = #sources == 1 and sources[1].kind == CODE.A_WALLET and sources[1].account == 0
  return remember('sources', text, sources)
end

function M.account_at(key)
  return sub(key, #work.prefix + 3)
end

-- What the rules need to say why: all rows of the call as they are now, and how many leases of each pool live.
function M.refused(ask, counts)
  local found = {}
  for i = 1, ask.n_keys do
    local key = keys[ask.k + i]
    local account = match(key, '^a:(.*)$', #work.prefix + 1)
    local book = account and work.books[account]
    found[i] = book and (book.is_moved or book.is_due_new) and M.book_text(book) or work.rows[key]
  end
  return { 'R', pack('>d', ask.now), counts, found, ask.further or {} }
end

-- -- rate limits --------------------------------------------------------------------------------------------

-- What one limit's counter would be after this call: its row, start, end, used before; nothing outside its calendar.
function M.counted(limit, text, now)
  local window = limit.window
  local start, finish, count, previous, used = now, now + window, 0, 0, nil
  local c_start, c_end, c_used, c_previous
  if text then
    c_start, c_end, c_used, c_previous = parse(AS.WINDOW, text)
  end
  if limit.kind == CODE.FIXED then
    if text and now < c_end then
      start, finish, count = c_start, c_end, c_used
    end
    used = count
  elseif limit.kind == CODE.CALENDAR then
    local _, from, to = M.pick(limit.bounds, now)
    if not from then
      return nil
    end
    start, finish = from, to
    if text and c_start > now then
      start, finish, count = c_start, c_end, c_used
    elseif text and c_start == start then
      count = c_used
    end
    used = count
  else
    local at = now
    if text and c_start > at then
      at = c_start
    end
    start = floor(at / window) * window
    finish = start + window
    if text and c_start == start then
      count, previous = c_used, c_previous
    elseif text and c_start == start - window then
      previous = c_used
    end
    used = floor(previous * (finish - at) / window) + count
  end
  local is_new = c_start ~= start or c_end ~= finish
  return pack(AS.WINDOW, start, finish, count + limit.cost, previous), start, finish, used, count, is_new
end

-- -- sources ------------------------------------------------------------------------------------------------

function M.window_of(ask, source)
  local own, now = ask.base + source.own, ask.now
  local start, finish, key, text
  if source.kind == CODE.A_CALENDAR then
    local index
    index, start, finish = M.pick(source.span, now)
    if not index then
      return nil
    end
    key = keys[own + index]
    text = work.rows[key]
  else
    local bucket = keys[own]
    local before = work.prefix .. 'w:' .. sub(bucket, #work.prefix + 3) .. CODE.GLUE
    local latest = work.rows[bucket]
    if latest then
      key = before .. latest
      text = M.fetch(key)
      ask.further = ask.further or {}
      ask.further[#ask.further + 1] = key
      ask.further[#ask.further + 1] = text
      start, finish = parse(AS.WINDOW, text)
    end
    if not latest or now > finish then
      start, finish = now, now + source.span[1]
      key, text = before .. M.flt(start), false
    end
  end
  local window = { key = key, start = start, finish = finish, settled = 0, held = 0, is_new = not text }
  if text then
    window.start, window.finish, window.settled, window.held = parse(AS.WINDOW, text)
  end
  return window
end

-- What the source could give; nothing where its calendar does not cover now.
function M.offer_of(ask, source, book)
  local window, can
  if source.kind == CODE.A_WALLET then
    can = M.available(book) + source.limit
  else
    window = M.window_of(ask, source)
    if not window then
      return nil
    end
    can = source.limit - window.settled - window.held
  end
  return { source = source, can = can, fits = min(ask.amount, can) >= ask.minimum, window = window }
end

-- Those of a split group's offers that give something, or the first one that owes nothing where nothing is taken.
function M.together(ask, offers)
  local giving, sum = {}, 0
  for _, offer in ipairs(offers) do
    if offer.can > 0 then
      giving[#giving + 1] = offer
      sum = sum + offer.can
    end
  end
  if ask.amount > 0 and #giving > 0 and sum >= ask.minimum then
    return giving
  end
  for _, offer in ipairs(offers) do
    if offer.fits then
      return { offer }
    end
  end
end

function M.account_of(ask, source)
  return M.account_at(source.account > 0 and keys[ask.base + source.account] or keys[ask.k + 2])
end

-- The first payer object that can pay takes the whole call: its book, and its sources that give. Without a book, why:
-- nothing if none can pay.
function M.first_group(ask, sources)
  local i = 1
  while i <= #sources do
    local book = M.book_at(M.account_of(ask, sources[i]), ask.now)
    if not book then
      return nil, CODE.LATER
    end
    local offers, known, is_split, giving = {}, {}, false, nil
    repeat
      local source = sources[i]
      local offer = M.offer_of(ask, source, book)
      if not offer then
        M.forget(book)
        return nil
      end
      if offer.fits and not source.split then
        giving = { offer }
        break
      end
      is_split = is_split or source.split
      -- A place that is named twice has no more for that.
      if not known[source.name] then
        known[source.name] = true
        offers[#offers + 1] = offer
      end
      i = i + 1
    until i > #sources or sources[i].first
    giving = giving or is_split and M.together(ask, offers)
    if giving then
      return book, giving
    end
    M.forget(book)
  end
  return nil
end

-- Hold up to the whole amount, of each offer in turn what it has. Returns the parts, what is held, what the last source
-- has left, and which one that is.
function M.take(ask, book, offers)
  local parts, left, left_there, last = {}, ask.amount, nil, nil
  for _, offer in ipairs(offers) do
    local some, window = min(left, offer.can), offer.window
    if window then
      parts[#parts + 1] = pack(AS.PART, CODE.FROM_ALLOWANCE, window.start, some, #offer.source.name, offer.source.name)
      M.put(window.key, pack(AS.WINDOW, window.start, window.finish, window.settled, window.held + some))
      if window.is_new then
        local bucket, start = match(sub(window.key, #work.prefix + 3), '^(.*)\31([^\31]*)$')
        local account, name = match(bucket, '^(.*\31.*)\31([^\31]*)$')
        M.push(work.past_windows, M.flt(window.finish), window.key)
        M.append(work.windows_of, account, name .. CODE.GLUE .. start)
        local latest = M.fetch(work.prefix .. 'W:' .. bucket)
        if not latest or window.start >= tonumber(latest) then
          M.put(work.prefix .. 'W:' .. bucket, start)
        end
      end
    else
      M.book_hold(book, some, parts)
    end
    left = left - some
    last = offer.source.index
    left_there = window and offer.can - some
    if left == 0 then
      break
    end
  end
  return concat(parts), ask.amount - left, left_there or M.available(book), last
end

-- -- the call -----------------------------------------------------------------------------------------------

function M.hold_text(ask, parts, held, who, rare, expires, due_at)
  return pack(
    AS.NEW_HOLD, CODE.NEW_HOLD_SIZE + #parts + #who + #rare + #ask.kept, 0, expires, due_at, 0, held, ask.now, ask.ttl,
    ask.grace, #parts, parts, #who, who, #rare, rare, ask.kept
  )
end

-- Looks at the calls of an account that are overdue: none is, or the rules have to end them.
function M.is_due(book, now)
  if book.due > now then
    return nil
  end
  if work.live[book.account] or work.ended_live[book.account] then
    return CODE.LATER
  end
  local first = call('ZRANGE', work.prefix .. 'l:' .. book.account, 0, 0, 'WITHSCORES')
  if first[2] and tonumber(first[2]) <= now then
    return CODE.RULES
  end
  book.due = tonumber(first[2] or 'inf')
  book.is_due_new = true
end

-- The first call of a key's window pays for all, the others join it free. Returns what `take` does, after the book and
-- who pays; or the key's row and who pays, for a call that joins.
function M.by_key(ask, sources, kind, span, at)
  local start, finish = ask.now, nil
  local bounds = M.doubles_of(span)
  if kind == CODE.CALENDAR then
    local index
    index, start, finish = M.pick(bounds, ask.now)
    if not index then
      return nil
    end
    at = at + index - 1
  else
    finish = ask.now + bounds[1]
  end
  local key = keys[at]
  local known = work.rows[key]
  if known then
    local k_start, k_end, members, settled, place = parse(AS.CHARGE_KEY, known)
    if kind == CODE.CALENDAR or ask.now < k_end or (settled == 0 and members > 0) then
      return { key = key, text = pack(AS.CHARGE_KEY, k_start, k_end, members + 1, settled) .. sub(known, place),
        hold = work.prefix .. 'h:' .. sub(known, place) }
    end
  end
  return { key = key, start = start, finish = finish }
end

function M.admit(k, a, n_keys, at)
  local numbers = args[a]
  local amount, minimum, ttl, grace, at_rare = parse('>dddd', numbers, at)
  if work.rows[keys[k + 1]] then
    -- The same id again: the reply was lost, not the decision.
    return nil, CODE.RULES
  end
  local limits, sources = M.limits_of(args[a + 1]), M.sources_of(args[a + 2])
  local who = args[a + 3]
  local ask = {
    k = k, n_keys = n_keys, base = k + n_keys - sources.keys, amount = amount, minimum = minimum, ttl = ttl,
    grace = grace, kept = args[a + 4], now = 0, further = false,
  }
  local account = M.account_at(keys[k + 2])
  local own = M.book_of(account)
  local now = max(work.now_is, own.seen)
  if not sources.is_plain then
    for _, source in ipairs(sources) do
      now = max(now, M.book_of(M.account_of(ask, source)).seen)
    end
    for _, source in ipairs(sources) do
      local why = M.is_due(M.book_of(M.account_of(ask, source)), now)
      if why then
        return nil, why
      end
    end
  end
  local why = M.is_due(own, now)
  if why then
    return nil, why
  end
  ask.now = now

  -- What is rare: slots, charge key, idempotency key.
  local leases, counts, charge_kind, charge_span, life, fingerprint = {}, {}, 0, '', 0, ''
  local extra = k + 3 + #limits
  local idempotency_key, claim = nil, 0
  if at_rare <= #numbers then
    local text
    text, charge_kind, charge_span, claim, life, fingerprint = parse('>I4c0BI4c0BdI4c0', numbers, at_rare)
    local at = 1
    while at <= #text do
      local pool = {}
      pool.key, pool.limit, at = parse('>I4c0d', text, at)
      leases[#leases + 1] = pool
    end
    if claim == 1 then
      idempotency_key = keys[extra]
      local row = work.rows[idempotency_key]
      if row then
        local expires, _, _, _, _, at_receipt = parse(AS.IDEMPOTENCY, row)
        if at_receipt > #row or expires > now then
          return M.refused(ask, counts)
        end
      end
      extra = extra + 1
    end
  end

  -- Rate limits: what they would be after this call.
  -- The first place is for the answer's own numbers.
  local counters, pinned, is_stale, is_spent = { '' }, nil, false, false
  local past = {}
  for i, limit in ipairs(limits) do
    local key = keys[k + 2 + i]
    local row, start, finish, used, count, is_new = M.counted(limit, work.rows[key], now)
    if not row then
      is_stale = true
      break
    end
    counters[i + 1] = row
    if used + limit.cost > limit.limit then
      is_spent = true
    end
    if count + limit.cost > CODE.MAX_AMOUNT then
      return nil, CODE.RULES
    end
    if is_new then
      M.push(past, M.flt(finish + (finish - start)), key)
    end
    if limit.meter ~= '' then
      local counter = M.account_at(key)
      pinned = (pinned or '') .. pack(AS.PINNED, start, limit.cost, #limit.meter, limit.meter, #counter, counter)
    end
  end
  if is_stale then
    return M.refused(ask, counts)
  end
  local is_full = false
  for i, pool in ipairs(leases) do
    counts[i] = M.live_leases(pool.key, now)
    if counts[i] >= pool.limit then
      is_full = true
    end
  end
  if is_full or is_spent then
    return M.refused(ask, counts)
  end

  -- Sources.
  local expires = now + ttl
  local book, giving, key, joined, is_held
  if #sources == 0 and amount == 0 then
    is_held = #leases > 0 or pinned or claim == 1
  else
    is_held = true
    if charge_kind > 0 then
      key = M.by_key(ask, sources, charge_kind, charge_span, extra)
      if not key then
        return M.refused(ask, counts)
      end
      joined = key.text
      if not joined and M.fetch(keys[k + 1] .. ':key') then
        -- An id that comes again long after: what it left behind has to go first.
        return nil, CODE.RULES
      end
    end
    if not joined then
      if sources.is_plain then
        local source = sources[1]
        book = M.book_at(account, now)
        if not book then
          return nil, CODE.LATER
        end
        local can = M.available(book) + source.limit
        if min(amount, can) >= minimum then
          giving = { { source = source, can = can } }
        else
          M.forget(book)
          book = nil
        end
      else
        book, giving = M.first_group(ask, sources)
        if not book and giving then
          return nil, giving
        end
      end
      if not book then
        return M.refused(ask, counts)
      end
      if not M.is_exact(book, amount) then
        M.forget(book)
        return nil, CODE.RULES
      end
    end
  end

  -- It may. From here on everything is taken.
  local parts, held, left_there, last = '', 0, 0, 0
  if book then
    parts, held, left_there, last = M.take(ask, book, giving)
    M.close_book(book, expires)
    local source = sources[last]
    who = source.who ~= '' and source.who or who
  end
  for i = 1, #limits do
    M.put(keys[k + 2 + i], counters[i + 1])
  end
  for i = 1, #past, 2 do
    M.push(work.past_counters, past[i], past[i + 1])
  end
  local hold_key, member = keys[k + 1], M.account_at(keys[k + 1])
  local charge_key, pools_text, rare_text = '', '', ''
  if joined then
    local owned = M.fetch(key.hold)
    if owned then
      who = select(11, parse(AS.HOLD, owned))
    end
    M.put(key.key, joined)
  elseif key then
    local owned = hold_key .. ':key'
    M.put(owned, M.hold_text(ask, parts, held, who, '', CODE.INF, CODE.INF))
    M.put(key.key, pack(AS.CHARGE_KEY, key.start, key.finish, 1, 0) .. M.account_at(owned))
    M.push(work.past_charge_keys, M.flt(key.finish), key.key)
    M.lives(parse('>I4c0', who), CODE.INF, M.account_at(owned))
    parts = ''
  end
  if key then
    charge_key = M.account_at(key.key)
  end
  if claim == 1 then
    M.put(idempotency_key, pack(AS.IDEMPOTENCY, now + life, #member, member, #fingerprint, fingerprint, 0, '', 0, ''))
    M.push(work.past_idempotency, M.flt(now + life), idempotency_key)
  end
  for _, pool in ipairs(leases) do
    M.lease(pool.key, member, expires)
    local name = M.account_at(pool.key)
    pools_text = pools_text .. pack('>I4c0', #name, name)
  end
  if pinned or charge_key ~= '' or claim == 1 or pools_text ~= '' then
    local its_key = idempotency_key and M.account_at(idempotency_key) or ''
    pinned = pinned or ''
    rare_text = pack(AS.RARE, #pinned, pinned, #pools_text, pools_text, #charge_key, charge_key, #its_key, its_key)
  end
  if is_held then
    local whole = charge_key == '' and held or 0
    M.put(hold_key, M.hold_text(ask, parts, whole, who, rare_text, expires, expires + grace))
    M.lives(parse('>I4c0', who), expires, member)
  end
  if joined then
    counters[1] = pack('>cdI4c0', 'J', now, #who, who)
  else
    counters[1] = pack('>cdddB', 'A', now, held, left_there, last)
  end
  return concat(counters)
end
