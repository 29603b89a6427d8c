// What `make sdk` makes of openapi/openapi.json for TypeScript.
//
// An operation that answers as JSON or as server-sent events becomes two functions, since the generator
// types one kind of answer a function: the one in `plain/`, and one of the same name in `streams/`.
import { fileURLToPath } from 'node:url';

const at = (path) => fileURLToPath(new URL(`../../openapi/${path}`, import.meta.url));
const STREAMS = 'text/event-stream';
const output = (path) => ({ path: at(path), importFileExtension: '.ts' });
const logs = { file: false };
const plugins = ['@hey-api/client-fetch'];

/** Of an operation's answers, the event stream alone where it has one; those are the ones kept. */
function streamed(method, path, operation) {
  const content = operation.responses?.['200']?.content;
  if (!content?.[STREAMS]) return;
  delete content['application/json'];
  operation.tags = ['streams'];
}

export default [
  { input: at('openapi.json'), output: output('sdk/typescript/plain'), logs, plugins },
  {
    input: at('openapi.json'),
    output: output('sdk/typescript/streams'),
    logs,
    parser: { patch: { operations: streamed }, filters: { tags: { include: ['streams'] } } },
    plugins,
  },
];
