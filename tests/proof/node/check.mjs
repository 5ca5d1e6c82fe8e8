// The official client for node against a running demo: `node check.mjs URL`. Ends with 0 when every check held.
import assert from "node:assert/strict";
import OpenAI from "openai";

const url = process.argv[2];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const base = "loramux-demo";
const adapter = "reverse";
const messages = [{ role: "user", content: "Reverse this: planet" }];

const checks = {
  async "models are listed and found"() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.ok(ids.includes(base) && ids.includes(adapter), ids.join());
    assert.equal((await client.models.retrieve(adapter)).id, adapter);
    assert.equal((await client.models.retrieve(`${adapter}@1`)).parent, base);
  },
  async "chat"() {
    const answer = await client.chat.completions.create({ model: adapter, messages, temperature: 0 });
    assert.equal(answer.choices[0].message.content, "tenalp");
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.equal(answer.loramux.adapters[0].name, adapter);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },
  async "a chat stream"() {
    const stream = await client.chat.completions.create({
      model: adapter, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
    });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, "tenalp");
    assert.ok(usage.completion_tokens > 0);
  },
  async "the chat stream helper"() {
    const runner = client.chat.completions.stream({ model: adapter, messages, temperature: 0 });
    assert.equal(await runner.finalContent(), "tenalp");
  },
  async "completions"() {
    const answer = await client.completions.create({ model: base, prompt: ["a", "b"], max_tokens: 3, temperature: 0 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
    let count = 0;
    for await (const event of await client.completions.create({ model: base, prompt: "a", max_tokens: 3, stream: true })) {
      count += event.choices.length;
    }
    assert.ok(count > 0);
  },
  async "embeddings, which this client asks for as base64"() {
    const vectors = (await client.embeddings.create({ model: base, input: ["a", "b c"] })).data.map((item) => item.embedding);
    for (const vector of vectors) {
      assert.ok(Math.abs(Math.hypot(...vector) - 1) < 1e-5);
    }
    const floats = await client.embeddings.create({ model: base, input: "a", encoding_format: "float" });
    floats.data[0].embedding.forEach((value, i) => assert.ok(Math.abs(value - vectors[0][i]) < 1e-5));
  },
  async "responses"() {
    const input = messages[0].content;
    const answer = await client.responses.create({ model: adapter, input, temperature: 0 });
    assert.equal(answer.output_text, "tenalp");
    assert.equal(answer.store, false);
    const kinds = [];
    for await (const event of await client.responses.create({ model: adapter, input, temperature: 0, stream: true })) {
      kinds.push(event.type);
    }
    assert.equal(kinds[0], "response.created");
    assert.equal(kinds.at(-1), "response.completed");
    const final = await client.responses.stream({ model: adapter, input, temperature: 0 }).finalResponse();
    assert.equal(final.output_text, "tenalp");
  },
  async "errors are the client's own classes"() {
    const chat = (body) => client.chat.completions.create({ model: base, messages, ...body });
    await assert.rejects(chat({ model: "nobody" }), (e) => e instanceof OpenAI.NotFoundError && e.code === "model_not_found");
    await assert.rejects(chat({ temperature: 9 }), (e) => e instanceof OpenAI.BadRequestError && e.param === "temperature");
    await assert.rejects(chat({ colour: 1 }), (e) => e instanceof OpenAI.BadRequestError && e.code === "unknown_parameter");
    await assert.rejects(
      client.moderations.create({ input: "x" }),
      (e) => e instanceof OpenAI.NotFoundError && e.code === "endpoint_not_supported",
    );
    await assert.rejects(
      client.responses.create({ model: base, input: "x", store: true }),
      (e) => e instanceof OpenAI.BadRequestError && e.param === "store" && Boolean(e.requestID),
    );
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok   ${name}`);
  } catch (error) {
    failed += 1;
    console.error(`FAIL ${name}\n${error.stack}`);
  }
}
process.exitCode = failed ? 1 : 0;
