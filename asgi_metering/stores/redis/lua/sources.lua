-- Sources: which payer object takes a call, and what of it each of its sources gives. Mirrors rules/admission.py from
-- _first_group on.

CODE.A_WALLET, CODE.A_CALENDAR, CODE.A_ROLLING = 0, 1, 2

local function sources_of(text)
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
  local only = sources[1]
  sources.is_plain = not only or (#sources == 1 and only.kind == CODE.A_WALLET and only.account == 0)
  return remember('sources', text, sources)
end

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
    text = rows[key]
  else
    local bucket = keys[own]
    local before = prefix .. 'w:' .. sub(bucket, #prefix + 3) .. CODE.GLUE
    local latest = rows[bucket]
    if latest then
      key = before .. latest
      text = fetch(key)
      ask.further = #ask.further > 0 and ask.further or {}
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
    can = available(book) + source.limit
  else
    window = M.window_of(ask, source)
    if not window then
      return nil
    end
    can = source.limit - window.settled - window.held
  end
  local fits = min(ask.amount, can) >= ask.minimum and (not window or can > 0)
  return { source = source, can = can, fits = fits, window = window }
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
  return source.account > 0 and rest(keys[ask.base + source.account]) or ask.account
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
    local offers, known, is_split, giving = nil, nil, false, nil
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
      offers, known = offers or {}, known or {}
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
      put(window.key, pack(AS.WINDOW, window.start, window.finish, window.settled, window.held + some))
      if window.is_new then
        local bucket, start = match(sub(window.key, #prefix + 3), '^(.*)\31([^\31]*)$')
        local account, name = match(bucket, '^(.*\31.*)\31([^\31]*)$')
        append(rare_of('past'), 'windows', window.finish, window.key)
        append(rare_of('windows'), account, name .. CODE.GLUE .. start)
        local latest = fetch(prefix .. 'W:' .. bucket)
        if not latest or window.start >= tonumber(latest) then
          put(prefix .. 'W:' .. bucket, start)
        end
      end
    else
      parts[#parts + 1] = M.book_hold(book, some)
    end
    left = left - some
    last = offer.source.index
    left_there = window and offer.can - some
    if left == 0 then
      break
    end
  end
  return concat(parts), ask.amount - left, left_there or available(book), last
end
