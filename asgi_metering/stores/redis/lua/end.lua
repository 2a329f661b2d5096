-- End a hold, once: settle or release, with its slots, keys, weighted limits and usage event. Mirrors rules/settlement.py
-- and rules/charging.py. Its key: hold. Its words: numbers and what is rare, what the event says.
-- Answers 'E', who pays and the receipt; 'X' with the first ones for a hold that has ended; 'U' for one that nobody
-- knows. Answers nothing, and why, if it could not be decided here; and whether it has begun to change books.

CODE.BY_CALL, CODE.BY_PERSON = 0, 2

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
      local key = work.prefix .. 'w:' .. book.account .. CODE.GLUE .. part.name .. CODE.GLUE .. M.flt(part.start)
      local text = M.fetch(key)
      if text then
        local start, finish, settled, kept = parse(AS.WINDOW, text)
        if settled + some > CODE.MAX_AMOUNT then
          return false
        end
        M.put(key, pack(AS.WINDOW, start, finish, settled + some, kept - part.amount))
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

-- Charge `amount` for a hold's parts. Returns the receipt, or nothing if it takes the whole rules.
function M.charge(ask, id, account, parts_text, held, amount)
  local basis, estimated = ask.basis, ask.estimated
  if parts_text == '' and amount == 0 then
    return M.nothing_charged(ask, id, held)
  end
  local book = M.book_at(account, ask.now)
  if not book or not M.is_exact(book, amount) then
    return nil
  end
  local parts, spent = M.parts_of(parts_text), {}
  if not M.consume(book, parts, amount, spent) then
    return nil
  end
  local known, number, spent_text = 0, 0, concat(spent)
  if amount > 0 then
    number = M.write(book, CODE.KIND_SETTLE, amount, id, ask.line, basis, estimated, spent_text)
    known = 2
  end
  M.close_book(book, CODE.INF)
  for _, part in ipairs(parts) do
    if part.source ~= CODE.FROM_ALLOWANCE then
      known = known + 1
      break
    end
  end
  if #parts == 0 then
    known = known + 1
  end
  local left = known % 2 == 1 and M.available(book) or 0
  return pack(
    AS.RECEIPT, ask.state, ask.mark, basis, estimated, ask.by, known, amount, held, left, ask.now, number, 0, #id, id,
    #spent_text, spent_text
  )
end

-- End one call of a charge key: its first success settles the key's hold, the last failure releases it. Returns the
-- call's own receipt; nothing if it takes the whole rules.
function M.end_member(ask, id, account, held, created, key)
  local nothing = M.nothing_charged(ask, id, held)
  local known = M.fetch(key)
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
    M.put(key, pack(AS.CHARGE_KEY, start, finish, members, 1) .. owned)
    return nothing
  end
  local owned_key = work.prefix .. 'h:' .. owned
  local text = M.fetch(owned_key)
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
    M.put(key, pack(AS.CHARGE_KEY, start, finish, members, 1) .. owned)
    M.put(owned_key, text .. receipt)
    M.append(work.ended_live, account, owned)
    M.push(work.ended, M.flt(ask.now), owned)
    return receipt
  end
  if members > 0 then
    M.put(key, pack(AS.CHARGE_KEY, start, finish, members, 0) .. owned)
    return nothing
  end
  local its = M.charge(ask, owned, account, o_parts, o_held, 0)
  if not its then
    return nil
  end
  -- The row stays: the late end of a call that was given up pays for its window, once.
  M.put(key, pack(AS.CHARGE_KEY, start, finish, 0, 0) .. owned)
  M.put(owned_key, text .. its)
  M.append(work.ended_live, account, owned)
  M.push(work.ended, M.flt(ask.now), owned)
  return nothing
end

-- The windows of weighted limits, as pinned at admission: what was used instead of what was taken.
function M.correct(windows, actual)
  local at = 1
  while at <= #windows do
    local start, taken, meter, counter
    start, taken, meter, counter, at = parse(AS.PINNED, windows, at)
    local used, key = actual[meter], work.prefix .. 'c:' .. counter
    local text = used and M.fetch(key)
    if text then
      local c_start, c_end, c_used, c_previous = parse(AS.WINDOW, text)
      if c_start == start then
        M.put(key, pack(AS.WINDOW, c_start, c_end, max(0, c_used + used - taken), c_previous))
      elseif c_start - (c_end - c_start) == start then
        M.put(key, pack(AS.WINDOW, c_start, c_end, c_used, max(0, c_previous + used - taken)))
      end
    end
  end
end

-- The idempotency key gets the answer; it is free again where nothing was done.
function M.answer_key(key, member, is_free, reply, who, receipt)
  local row = M.fetch(key)
  if not row then
    return
  end
  local expires, holder, fingerprint = parse(AS.IDEMPOTENCY, row)
  if holder ~= member then
    return
  end
  if is_free then
    M.drop(key, 'idempotency')
  else
    local first = pack(AS.IDEMPOTENCY, expires, #holder, holder, #fingerprint, fingerprint, #reply, reply, #who, who)
    M.put(key, first .. receipt)
  end
end

function M.finish(k, a, _, at)
  local key = keys[k + 1]
  local text = work.rows[key]
  if not text then
    return pack('>cd', 'U', work.now_is)
  end
  local numbers = args[a]
  local state, amount, basis, estimated, by, failed, at_rare = parse('>BdBBBB', numbers, at)
  local size, _, _, _, _, held, created, _, _, parts, who, rare, line = parse(AS.HOLD, text)
  if size < #text then
    local _, mark = parse('>BB', text, size + 1)
    if by == CODE.BY_CALL and mark ~= CODE.CLOSED then
      return nil, CODE.RULES
    end
    return pack('>cI4c0c0', 'X', #who, who, sub(text, size + 1))
  end
  local account = parse('>I4c0', who)
  local book, member = M.book_of(account), M.rest(key)
  local now = max(work.now_is, book.seen)
  if book.is_moved and now >= book.change then
    return nil, CODE.LATER
  end
  local ask = {
    now = now, state = state, mark = by == CODE.BY_CALL and CODE.CLOSED or CODE.OPEN_TO_LATE, basis = basis,
    estimated = estimated, by = by, line = line,
  }
  local told = args[a + 1]
  local windows, pools_text, charge_key, idempotency_key = '', '', '', ''
  if rare ~= '' then
    windows, pools_text, charge_key, idempotency_key = parse(AS.RARE, rare)
  end
  if charge_key ~= '' and by == CODE.BY_PERSON then
    -- What a person says is not the price of the key.
    return nil, CODE.RULES
  end
  local receipt
  if charge_key == '' then
    receipt = M.charge(ask, member, account, parts, held, amount)
  else
    receipt = M.end_member(ask, member, account, held, created, work.prefix .. 'k:' .. charge_key)
  end
  if not receipt then
    return nil, CODE.RULES, true
  end
  local new = text .. receipt
  M.put(key, new)
  M.append(work.ended_live, account, member)
  M.push(work.ended, M.flt(now), member)
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
      M.answer_key(work.prefix .. 'i:' .. idempotency_key, member, failed == 1 and charged == 0, reply, who, receipt)
    end
    M.correct(windows, actual)
    for _, pool in ipairs(M.texts_of(pools_text)) do
      M.lease(work.prefix .. 'q:' .. pool, member, false)
    end
  end
  if told ~= '' then
    work.event_ids[#work.event_ids + 1] = member
    M.push(work.events, member, pack(AS.NEW_EVENT, now, 0, CODE.AS_HOLD, #told, told, new))
  end
  return pack('>cI4c0c0', 'E', #who, who, receipt)
end
