/** One streamed chat completion: what is asked, and what comes of it, with times. */

import { ApiError } from "./api.js";
import { events } from "./sse.js";

/** What a stream has shown so far. Times are in ms from the sending. */
export class Answer {
  text = "";
  reasoning = "";
  served = null;
  usage = null;
  finish = null;
  error = null;
  stopped = false;
  firstText = null;
  lastText = null;
  ended = null;

  /** The answer as a turn of the conversation to go on with. */
  get turn() {
    const thought = this.reasoning ? { reasoning_content: this.reasoning } : {};
    return { role: "assistant", content: this.text, ...thought };
  }

  /** Tokens of the answer, when the server has said. */
  get tokens() {
    return this.usage?.completion_tokens ?? null;
  }

  /** Tokens per second after the first; null when there is nothing to divide. */
  get speed() {
    const span = this.lastText - this.firstText;
    return this.tokens > 1 && span > 0 ? ((this.tokens - 1) / span) * 1000 : null;
  }
}

/** Streams `body` into `answer`; `changed` is called after every event. Failures end in `answer.error`, never in a throw. */
export async function complete(api, body, answer, { signal, changed }) {
  const start = performance.now();
  let done = false;
  try {
    const response = await api.request("POST", "v1/chat/completions", {
      body: { ...body, stream: true, stream_options: { include_usage: true } },
      signal,
    });
    for await (const data of events(response)) {
      if (data === "[DONE]") {
        done = true;
        break;
      }
      take(answer, JSON.parse(data), performance.now() - start);
      changed();
    }
    if (!done) throw new ApiError("The answer was cut off: the connection ended before the stream did.");
  } catch (error) {
    if (error.name === "AbortError") answer.stopped = true;
    else
      answer.error = error instanceof ApiError ? error : new ApiError(`The stream could not be read: ${error.message}`);
  }
  answer.ended = performance.now() - start;
  changed();
}

/** One chunk. Throws ApiError for an error chunk. */
function take(answer, chunk, now) {
  if (chunk.error) throw new ApiError(chunk.error.message ?? "The server failed.", { code: chunk.error.code });
  if (chunk.loramux) answer.served = chunk.loramux;
  if (chunk.usage) answer.usage = chunk.usage;
  for (const choice of chunk.choices ?? []) {
    const [text, reasoning] = [choice.delta?.content ?? "", choice.delta?.reasoning_content ?? ""];
    if (text || reasoning) {
      answer.firstText ??= now;
      answer.lastText = now;
      answer.text += text;
      answer.reasoning += reasoning;
    }
    answer.finish = choice.finish_reason ?? answer.finish;
  }
}
