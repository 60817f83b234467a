// aimock on a free port: says where, and ends with whoever holds the other end of standard input.
import { LLMock } from "@copilotkit/aimock";

const mock = new LLMock({ port: 0 });
await mock.start();
console.log(mock.url);
process.stdin.on("end", () => process.exit()).resume();
