// Does with the stock client of Supabase what it is told, and tells what comes of it.
//
// In Node (supabase.mjs) and in pages alike; bytes are {"$bytes": "base64"} both ways.

export function makeTold({ createClient, postgresChangesFilter }, emit, transport) {
  const clients = new Map()
  const channels = new Map()
  const tokens = new Map()

  const actions = {
    client({ name, url, key, token, realtime = {}, reconnectMs, heartbeatMs }) {
      tokens.set(name, token)
      const options = { realtime: { ...(transport && { transport }), ...realtime } }
      if (reconnectMs !== undefined) options.realtime.reconnectAfterMs = () => reconnectMs
      if (heartbeatMs !== undefined) options.realtime.heartbeatIntervalMs = heartbeatMs
      if (token !== undefined) options.accessToken = async () => tokens.get(name)
      clients.set(name, createClient(url, key, options))
    },
    // The client asks the application's accessToken again when it likes: that has to know it, too.
    // The application has another token, which the client has to ask for by itself.
    token({ client, token }) {
      tokens.set(client, token)
    },
    setAuth({ client, token }) {
      tokens.set(client, token)
      return clients.get(client).realtime.setAuth(token)
    },
    channel({ client, name, topic, config }) {
      channels.set(name, clients.get(client).channel(topic, config ? { config } : undefined))
    },
    // With `follow`, what is documented for applications that want to miss nothing: three lines.
    on({ channel, type, filter, label, follow }) {
      if (filter.filter?.$calls) {
        const add = (builder, [operator, ...given]) => builder[operator](...given)
        filter.filter = filter.filter.$calls.reduce(add, postgresChangesFilter())
      }
      channels.get(channel).on(type, filter, (payload) => {
        if (follow) filter.since = payload.new.$position ?? payload.old.$position
        emit({ kind: type, channel, label, payload: pack(payload) })
      })
    },
    subscribe({ channel, timeout }) {
      const tell = (status, error) =>
        emit({ kind: "status", channel, status, error: error?.message ?? null })
      channels.get(channel).subscribe(tell, timeout)
    },
    send({ channel, message }) {
      return channels.get(channel).send(unpack(message))
    },
    httpSend({ channel, event, payload }) {
      return channels.get(channel).httpSend(event, unpack(payload))
    },
    track({ channel, payload, opts }) {
      return channels.get(channel).track(payload, opts)
    },
    untrack({ channel }) {
      return channels.get(channel).untrack()
    },
    presenceState({ channel }) {
      return channels.get(channel).presenceState()
    },
    state({ channel }) {
      return channels.get(channel).state
    },
    removeChannel({ client, channel }) {
      return clients.get(client).removeChannel(channels.get(channel))
    },
    onHeartbeat({ client }) {
      const tell = (payload) => emit({ kind: "heartbeat", channel: client, label: "", payload })
      clients.get(client).realtime.onHeartbeat(tell)
    },
    async close({ names }) {
      await Promise.all(names.map((name) => clients.get(name).removeAllChannels()))
    },
  }

  return async ({ id, action, ...given }) => {
    try {
      const result = await actions[action](given)
      emit({ kind: "done", id, result: pack(result) ?? null })
    } catch (error) {
      emit({ kind: "failed", id, error: String(error) })
    }
  }
}

function pack(value) {
  if (value instanceof ArrayBuffer) {
    return { $bytes: btoa(String.fromCharCode(...new Uint8Array(value))) }
  }
  return through(value, pack)
}

function unpack(value) {
  if (value && typeof value.$bytes === "string") {
    return Uint8Array.from(atob(value.$bytes), (one) => one.charCodeAt(0)).buffer
  }
  return through(value, unpack)
}

function through(value, change) {
  if (Array.isArray(value)) return value.map(change)
  if (value === null || typeof value !== "object") return value
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, change(one)]))
}
