// Texts of JSON, laid out to be read.

const TOKEN = /"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g;
const LENGTH_MAX = 50_000;
const DEPTH_MAX = 12; // deeper levels are indented no further, so that brackets alone do not become a megabyte

/** A JSON text with line breaks and indents. Its numbers and names stay as they are written; what is no JSON, or long, stays as it is. */
export function laidOut(text) {
  if (text.length > LENGTH_MAX || !isJson(text)) return text;
  let made = "";
  let depth = 0;
  let before = "";
  const line = () => `\n${"  ".repeat(Math.min(depth, DEPTH_MAX))}`;
  for (const [token] of text.matchAll(TOKEN)) {
    const closes = token === "}" || token === "]";
    if (closes) depth -= 1;
    const isOpen = before === "{" || before === "[";
    if (isOpen ? !closes : before === "," || (closes && before !== "")) made += line();
    made += token === ":" ? ": " : token;
    if (token === "{" || token === "[") depth += 1;
    before = token;
  }
  return made;
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}
