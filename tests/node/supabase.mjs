// The stock client of Supabase, told by lines of JSON what to do; tells by lines of JSON.
import { createInterface } from "node:readline"
import * as supabase from "@supabase/supabase-js"
import WebSocket from "ws"
import { makeTold } from "./told.mjs"

const tell = makeTold(supabase, (event) => console.log(JSON.stringify(event)), WebSocket)
console.warn = console.info = console.debug = console.error
createInterface({ input: process.stdin })
  .on("line", (line) => tell(JSON.parse(line)))
  .on("close", () => process.exit(0))
