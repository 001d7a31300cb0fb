/** Markdown by the model, as HTML in which nothing of it is markup, in blocks, so that only those that grow are drawn anew. */
import hljs from "highlight.js/lib/common";
import MarkdownIt from "markdown-it";

const REMEMBERED = 200;
const WEB = /^https?:\/\//i;
const coloured = new Map<string, string>();

const markdown = new MarkdownIt({ html: false, linkify: false, typographer: false, highlight }).disable("image");
markdown.validateLink = (address) => WEB.test(address);
markdown.renderer.rules.fence = (tokens, index) => code(tokens[index].content, tokens[index].info.trim().split(/\s+/)[0]);
markdown.renderer.rules.code_block = (tokens, index) => code(tokens[index].content, "");
markdown.renderer.rules.link_open = (tokens, index, options, _environment, renderer) => {
  tokens[index].attrSet("title", tokens[index].attrGet("href") ?? ""); // where it leads is seen before it is followed
  return renderer.renderToken(tokens, index, options);
};

/** The HTML of every block at the top level. */
export function blocks(text: string): string[] {
  const environment = {};
  const found: string[] = [];
  let depth = 0;
  let begun = 0;
  const tokens = markdown.parse(text, environment);
  tokens.forEach((token, index) => {
    depth += token.nesting;
    if (depth === 0) {
      found.push(markdown.renderer.render(tokens.slice(begun, index + 1), markdown.options, environment));
      begun = index + 1;
    }
  });
  return found;
}

function code(text: string, language: string): string {
  const label = markdown.utils.escapeHtml(language || "text");
  return `<section class="code" aria-label="Code, ${label}"><header><span>${label}</span>
<button type="button" class="insert" title="Insert at the editor's cursor">Insert</button>
<button type="button" class="copy" title="Copy to the clipboard">Copy</button></header>
<pre tabindex="0"><code>${highlight(text.replace(/\n$/, ""), language)}</code></pre></section>`;
}

function highlight(text: string, language: string): string {
  if (!hljs.getLanguage(language)) {
    return markdown.utils.escapeHtml(text);
  }
  const key = `${language}\n${text}`;
  const known = coloured.get(key) ?? hljs.highlight(text, { language, ignoreIllegals: true }).value;
  if (coloured.size >= REMEMBERED) {
    coloured.clear();
  }
  coloured.set(key, known);
  return known;
}
