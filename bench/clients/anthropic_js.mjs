// Anthropic's client for JavaScript, on which coding agents are built: messages, streams, tools.

import Anthropic from "@anthropic-ai/sdk";

import { ASKED, LONG, N_TOKENS, WEATHER, checkWeather, expect, expectIdle, report } from "./cells.mjs";

const url = process.argv[2];
const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const brief = { model: "demo", messages: ASKED, max_tokens: N_TOKENS, temperature: 0 };
const tools = [{ name: "weather", description: "Tells the weather.", input_schema: WEATHER }];

await report("@anthropic-ai/sdk", {
  async chat() {
    expect((await client.messages.create(brief)).content[0].text, "no text");
  },
  async stream() {
    const whole = await client.messages.create(brief);
    expect((await client.messages.stream(brief).finalText()) === whole.content[0].text, whole);
  },
  async tools() {
    const asked = { ...brief, max_tokens: 200, tools };
    const first = await client.messages.create({ ...asked, tool_choice: { type: "any", disable_parallel_tool_use: true } });
    const calls = first.content.filter((block) => block.type === "tool_use");
    checkWeather(calls[0].input);
    const results = calls.map((call) => ({ type: "tool_result", tool_use_id: call.id, content: "18 degrees" }));
    const messages = [...ASKED, { role: "assistant", content: first.content }, { role: "user", content: results }];
    const last = await client.messages.create({ ...asked, messages, tool_choice: { type: "none" } });
    expect(last.content[0].type === "text", last);
    const streamed = await client.messages.stream({ ...asked, tool_choice: { type: "any", disable_parallel_tool_use: true } }).finalMessage();
    checkWeather(streamed.content.find((block) => block.type === "tool_use").input);
  },
  async schema() {
    const asked = { ...brief, max_tokens: 200, tools, tool_choice: { type: "tool", name: "weather" } };
    checkWeather((await client.messages.create(asked)).content.find((block) => block.type === "tool_use").input);
  },
  async usage() {
    const counted = await client.messages.countTokens({ model: "demo", messages: ASKED });
    const { usage } = await client.messages.create(brief);
    expect(counted.input_tokens === usage.input_tokens + (usage.cache_read_input_tokens ?? 0), usage);
  },
  async errors() {
    const error = await client.messages.create({ ...brief, messages: [{ role: "user", content: LONG }] }).catch((found) => found);
    expect(error instanceof Anthropic.BadRequestError && error.error.error.type === "invalid_request_error", error);
  },
  async cancel() {
    const stream = await client.messages.create({ ...brief, max_tokens: 1500, ignore_eos: true, stream: true });
    for await (const event of stream) if (event.type === "content_block_delta") break;
    await expectIdle(url);
  },
});
