-- End a hold, once: settle or release, with its slots, keys, weighted limits and usage event. Mirrors rules/settlement.py
-- and rules/charging.py. Its key: hold. Its words: numbers and what is rare, what the event says.
-- Answers 'E', who pays and the receipt; 'X' with the first ones for a hold that has ended; 'U' for one that nobody
-- knows. Answers nothing, and why, if it could not be decided here; and whether it has begun to change books.

CODE.BY_CALL, CODE.BY_PERSON = 0, 2

local BY_CALL, CLOSED, OPEN_TO_LATE, AS_HOLD_CODE = CODE.BY_CALL, CODE.CLOSED, CODE.OPEN_TO_LATE, CODE.AS_HOLD

function M.parts_of(text)
  local parts, at = {}, 1
  while at <= #text do
    local part = {}
    part.source, part.start, part.amount, part.name, at = parse(AS.PART, text, at)
    parts[#parts + 1] = part
  end
  return parts
end

-- Where the charge came from: allowances one by one, the wallet's parts together. False if what was held is gone.
function M.consume(book, parts, left, spent)
  local at = 1
  while at <= #parts do
    local run = { parts[at] }
    local is_window = run[1].source == CODE.FROM_ALLOWANCE
    at = at + 1
    while not is_window and at <= #parts and parts[at].source ~= CODE.FROM_ALLOWANCE do
      run[#run + 1] = parts[at]
      at = at + 1
    end
    local some = left
    if at <= #parts then
      local sum = 0
      for _, part in ipairs(run) do
        sum = sum + part.amount
      end
      some = min(left, sum)
    end
    left = left - some
    if is_window then
      local part = run[1]
      local key = prefix .. 'w:' .. book.account .. CODE.GLUE .. part.name .. CODE.GLUE .. M.flt(part.start)
      local text = fetch(key)
      if text then
        local start, finish, settled, kept = parse(AS.WINDOW, text)
        if settled + kept + some > CODE.MAX_AMOUNT then
          return false
        end
        put(key, pack(AS.WINDOW, start, finish, settled + some, kept - part.amount))
      elseif part.amount > 0 then
        return false
      end
      if some > 0 then
        spent[#spent + 1] = pack(AS.PART, CODE.FROM_ALLOWANCE, part.start, some, #part.name, part.name)
      end
    elseif not M.settle(book, run, some, spent) then
      return false
    end
  end
  return left == 0 or M.settle(book, {}, left, spent)
end

function M.nothing_charged(ask, id, held)
  return pack(
    AS.RECEIPT, ask.state, ask.mark, ask.basis, ask.estimated, ask.by, 0, 0, held, 0, ask.now, 0, 0, #id, id, 0, ''
  )
end

-- Where the charge came from, as parts, and whether that is known to be the wallet. Nothing if what was held is gone.
function M.charged_to(book, parts_text, amount)
  if parts_text ~= '' then
    local source, _, held, name, at = parse(AS.PART, parts_text)
    if source == CODE.FROM_GRANT and at > #parts_text and amount <= held and book.debt == 0 then
      -- Of most calls: one grant, which has enough.
      if not M.settle_grant(book, name, held, amount) then
        return nil
      end
      if amount == held then
        return parts_text, true
      end
      return amount > 0 and pack(AS.PART, source, 0, amount, #name, name) or '', true
    end
  end
  local spent = {}
  return M.consume(book, M.parts_of(parts_text), amount, spent) and concat(spent)
end

-- Whether anything of what was held, or is charged without that, is the wallet's.
function M.is_of_wallet(parts_text)
  local at = 1
  while at <= #parts_text do
    local source, _, _, _, place = parse(AS.PART, parts_text, at)
    if source ~= CODE.FROM_ALLOWANCE then
      return true
    end
    at = place
  end
  return parts_text == ''
end

-- The same where the account has one grant and its `row` is to be changed as a text, and the call holds one part of that:
-- spends `amount` of it and gives back the rest, as settle_grant, write and close_book do. Returns the receipt and its
-- time; nothing if it takes a book.
local function end_row(id, account, key, row, parts_text, whole, amount, state, mark, basis, estimated, by, line)
  local granted, settled, held, expired, debt, entries, change, due, seen, size, priority, begins, ends, number, g_settled,
    g_held, g_expired, begun, reversed, grant, others, at = parse(AS_BOOK, row)
  local now = now_is < seen and seen or now_is
  if at <= #row or change <= now or debt > 0 then
    return nil
  end
  local source, _, held_there, name, at_next = parse(AS_PART, parts_text)
  if source ~= FROM_GRANT or at_next <= #parts_text or amount > held_there or grant ~= name then
    return nil
  end
  if (ends <= now and amount < held_there) or max(granted, settled + held, expired) + amount > MAX_AMOUNT then
    return nil
  end
  settled, held, g_settled, g_held = settled + amount, held - held_there, g_settled + amount, g_held - held_there
  if g_settled + g_expired + reversed >= size then
    return nil
  end
  local left, spent, written, known = granted - settled - expired - held, parts_text, 0, 1
  if amount < held_there then
    spent = amount > 0 and pack(AS_PART, source, 0, amount, #name, name) or ''
  end
  if amount > 0 then
    written, entries, known = entries + 1, entries + 1, 3
    keep_line(account, pack(
      AS_NEW_ENTRY, KIND_SETTLE, basis, estimated, written, now, amount, left, #id, id, #line, line, #spent, spent, 0, 0
    ))
  end
  put(key, pack(
    AS_BOOK, granted, settled, held, expired, debt, entries, change, due, now, size, priority, begins, ends, number,
    g_settled, g_held, g_expired, begun, reversed, #grant, grant, #others, others
  ))
  return pack(
    AS_RECEIPT, state, mark, basis, estimated, by, known, amount, whole, left, now, written, 0, #id, id, #spent, spent
  ), now
end

-- Charge `amount` for a hold's parts. Returns the receipt, or nothing if it takes the whole rules.
function M.charge(ask, id, account, parts_text, held, amount)
  local basis, estimated, now = ask.basis, ask.estimated, ask.now
  if parts_text == '' and amount == 0 then
    return M.nothing_charged(ask, id, held)
  end
  local book = M.book_at(account, now)
  if not book or not M.is_exact(book, amount) then
    return nil
  end
  local spent, is_wallet = M.charged_to(book, parts_text, amount)
  if not spent then
    return nil
  end
  local known, number, left = 0, 0, 0
  if amount > 0 then
    number = M.write(book, CODE.KIND_SETTLE, amount, id, ask.line, basis, estimated, spent)
    known = 2
  end
  M.close_book(book, CODE.INF)
  if is_wallet or M.is_of_wallet(parts_text) then
    known, left = known + 1, available(book)
  end
  return pack(
    AS.RECEIPT, ask.state, ask.mark, basis, estimated, ask.by, known, amount, held, left, now, number, 0, #id, id,
    #spent, spent
  )
end

-- End one call of a charge key: its first success settles the key's hold, the last failure releases it. Returns the
-- call's own receipt; nothing if it takes the whole rules.
function M.end_member(ask, id, account, held, created, key)
  local nothing = M.nothing_charged(ask, id, held)
  local known = fetch(key)
  if not known then
    return nothing
  end
  local start, finish, members, settled, at = parse(AS.CHARGE_KEY, known)
  if created < start then
    return nothing
  end
  local owned = sub(known, at)
  members = max(0, members - 1)
  if settled == 1 then
    put(key, pack(AS.CHARGE_KEY, start, finish, members, 1) .. owned)
    return nothing
  end
  local owned_key = prefix .. 'h:' .. owned
  local text = fetch(owned_key)
  if not text then
    return nil
  end
  local size, _, _, _, _, o_held, _, _, _, o_parts, o_who = parse(AS.HOLD, text)
  if size < #text or parse('>I4c0', o_who) ~= account then
    return nil
  end
  if ask.state == CODE.SETTLED then
    local receipt = M.charge(ask, id, account, o_parts, o_held, o_held)
    if not receipt then
      return nil
    end
    put(key, pack(AS.CHARGE_KEY, start, finish, members, 1) .. owned)
    put(owned_key, text .. receipt)
    lives_no_more(account, owned)
    has_ended(owned, ask.now)
    return receipt
  end
  if members > 0 then
    put(key, pack(AS.CHARGE_KEY, start, finish, members, 0) .. owned)
    return nothing
  end
  local its = M.charge(ask, owned, account, o_parts, o_held, 0)
  if not its then
    return nil
  end
  -- The row stays: the late end of a call that was given up pays for its window, once.
  put(key, pack(AS.CHARGE_KEY, start, finish, 0, 0) .. owned)
  put(owned_key, text .. its)
  lives_no_more(account, owned)
  has_ended(owned, ask.now)
  return nothing
end

-- Mirrors corrected in rules/buckets.py.
function M.correct_bucket(key, text, start, delta, now)
  local c_start, c_end, taken, previous = parse(AS.WINDOW, text)
  if now >= c_end or (delta < 0 and c_start ~= start) then
    return
  end
  local _, pace, fill = parse('>ddd', text, CODE.BEHIND + 1)
  local kept, prior = sub(text, CODE.BEHIND, CODE.PRIOR - 1), sub(text, CODE.PRIOR)
  if delta > 0 and start > c_start then
    c_start, taken, previous, prior = start, delta, taken, pack('>d', c_start)
  else
    taken = max(0, taken + delta)
  end
  taken = min(CODE.MAX_AMOUNT, taken)
  if taken == 0 and prior ~= '' then
    c_start, taken, previous, prior = parse('>d', prior), previous, 0, ''
  end
  local finish = c_start + taken * pace + fill
  put(key, pack(AS.WINDOW, c_start, finish, taken, previous) .. kept .. prior)
  append(rare_of('past'), 'counters', finish + (finish - c_start), key)
end

-- Mirrors without in rules/logs.py.
function M.leave_log(key, text, time, some)
  local from = M.first_from(text, time)
  local to = from
  while to <= #text and to < from + 8 * some and parse('>d', text, to) == time do
    to = to + 8
  end
  if to == from then
    return
  end
  local c_start, c_end = parse(AS.WINDOW, text)
  local log = sub(text, CODE.BEHIND + 1, from - 1) .. sub(text, to)
  local newest = #log > 0 and parse('>d', log, #log - 7) or c_start
  local finish = newest + (c_end - c_start)
  put(key, pack(AS.WINDOW, newest, finish, #log / 8, 0) .. CODE.LOG .. log)
  append(rare_of('past'), 'counters', finish + (finish - newest), key)
end

-- Both below 2^53, so that their sum is exact, or beyond what is counted: not so in another order.
local function corrected(count, delta)
  return min(CODE.MAX_AMOUNT, max(0, count + delta))
end

-- The windows of weighted limits, as pinned at admission: what was used instead of what was taken.
function M.correct(windows, actual, now)
  local at = 1
  while at <= #windows do
    local start, taken, meter, counter
    start, taken, meter, counter, at = parse(AS.PINNED, windows, at)
    local used, key = actual[meter], prefix .. 'c:' .. counter
    local text = used and fetch(key)
    if text then
      local c_start, c_end, c_used, c_previous = parse(AS.WINDOW, text)
      local kind = sub(text, CODE.BEHIND, CODE.BEHIND)
      if kind == CODE.FILLED then
        M.correct_bucket(key, text, start, used - taken, now)
      elseif kind == CODE.LOG then
        M.leave_log(key, text, start, taken - used)
      elseif c_start == start then
        put(key, pack(AS.WINDOW, c_start, c_end, corrected(c_used, used - taken), c_previous))
      elseif c_start - (c_end - c_start) == start then
        put(key, pack(AS.WINDOW, c_start, c_end, c_used, corrected(c_previous, used - taken)))
      end
    end
  end
end

-- The idempotency key gets the answer; it is free again where nothing was done, and then nobody's. Without a receipt it
-- is as if nobody had brought it.
function M.answer_key(key, member, is_free, reply, who, receipt)
  local row = fetch(key)
  if not row then
    return
  end
  local expires, holder, fingerprint = parse(AS.IDEMPOTENCY, row)
  if holder ~= member then
    return
  end
  if not receipt then
    M.drop(key, 'idempotency')
    return
  end
  if is_free then
    holder, reply = '', ''
  end
  local first = pack(AS.IDEMPOTENCY, expires, #holder, holder, #fingerprint, fingerprint, #reply, reply, #who, who)
  put(key, first .. receipt)
end

-- How the call ends: one after the other, in the same table.
local ending = { now = 0, state = 0, mark = 0, basis = 0, estimated = 0, by = 0, line = '' }

function M.finish(k, a, _, at)
  local key = keys[k + 1]
  local text = rows[key]
  if not text then
    return pack('>cd', 'U', now_is)
  end
  local numbers = args[a]
  local state, amount, basis, estimated, by, failed, at_rare = parse('>BdBBBB', numbers, at)
  local size, _, _, _, _, held, created, _, _, parts, who, rare, line = parse(AS_HOLD, text)
  if size < #text then
    local _, mark = parse('>BB', text, size + 1)
    if by == CODE.BY_CALL and mark ~= CODE.CLOSED then
      return nil, CODE.RULES
    end
    return pack('>cI4', 'X', #who) .. who .. sub(text, size + 1)
  end
  local account = whose[k] or parse('>I4c0', who)
  local member, book, account_key, row = rest(key), books[account], nil, nil
  if not book then
    account_key = whose_key[k] or before_account .. account
    row = plain_row(account_key)
  end
  local mark, told = by == BY_CALL and CLOSED or OPEN_TO_LATE, args[a + 1]
  local windows, pools_text, charge_key, idempotency_key = '', '', '', ''
  if rare ~= '' then
    windows, pools_text, charge_key, idempotency_key = parse(AS.RARE, rare)
  end
  if charge_key ~= '' and by == CODE.BY_PERSON then
    -- What a person says is not the price of the key.
    return nil, CODE.RULES
  end
  local receipt, now
  if row and charge_key == '' and parts ~= '' then
    -- Of most calls.
    receipt, now = end_row(
      member, account, account_key, row, parts, held, amount, state, mark, basis, estimated, by, line
    )
  end
  if not receipt then
    book = book_of(account, account_key)
    now = max(now_is, book.seen)
    if book.is_moved and now >= book.change then
      return nil, CODE.LATER
    end
    local ask = ending
    ask.now, ask.state, ask.mark, ask.basis, ask.estimated, ask.by, ask.line =
      now, state, mark, basis, estimated, by, line
    if charge_key == '' then
      receipt = M.charge(ask, member, account, parts, held, amount)
    else
      receipt = M.end_member(ask, member, account, held, created, prefix .. 'k:' .. charge_key)
    end
  end
  if not receipt then
    return nil, CODE.RULES, true
  end
  local new = text .. receipt
  put(key, new)
  lives_no_more(account, member)
  has_ended(member, now)
  if rare ~= '' then
    local reply, actual, from = '', {}, nil
    if at_rare <= #numbers then
      reply, from = parse('>I4c0', numbers, at_rare)
      while from <= #numbers do
        local meter, used
        meter, used, from = parse('>I4c0d', numbers, from)
        actual[meter] = used
      end
    end
    if idempotency_key ~= '' then
      local _, _, _, _, _, _, charged = parse('>BBBBBBd', receipt)
      M.answer_key(prefix .. 'i:' .. idempotency_key, member, failed == 1 and charged == 0, reply, who, receipt)
    end
    M.correct(windows, actual, now)
    for _, pool in ipairs(M.texts_of(pools_text)) do
      M.lease(prefix .. 'q:' .. pool, member, false)
    end
  end
  if told ~= '' then
    local n = n_events + 1
    local place = 2 * n
    event_ids[n], events[place - 1] = member, member
    events[place], n_events = pack(AS_NEW_EVENT, now, 0, AS_HOLD_CODE, #told) .. told .. new, n
  end
  return pack('>cI4', 'E', #who) .. who .. receipt
end
