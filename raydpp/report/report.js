// Draws every figure from the specification that stands in it, again when the screen turns dark or light.
const dark = matchMedia("(prefers-color-scheme: dark)");
const configs = JSON.parse(document.getElementById("configs").textContent);

// The text that a script element holds as gzip in base64.
async function unpack(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// {name: [value, ...], ...} -> [{name: value, ...}, ...]
function rows(columns) {
  const names = Object.keys(columns);
  return columns[names[0]].map((_, row) => Object.fromEntries(names.map((name) => [name, columns[name][row]])));
}

// Shows the whole text of a point below the figure. Text of examples is only ever set as text.
function pin(figure, point) {
  const [panel, head, text] = ["aside", "aside p", "aside pre"].map((part) => figure.querySelector(part));
  panel.hidden = false;
  head.textContent = (point.rank ? `pick ${point.rank}, ` : "") + point.name;
  text.textContent = point.text;
  text.scrollTop = 0;
}

async function draw(figure) {
  const { spec, columns } = JSON.parse(await unpack(figure.querySelector("script")));
  const large = Object.keys(columns).length > 0;
  if (large) spec.data = { values: rows(columns) };
  const options = {
    actions: false, ast: true, config: configs[+dark.matches], defaultStyle: false, renderer: large ? "canvas" : "svg",
    tooltip: { disableDefaultStyle: true },
  };
  figure.drawn?.finalize();
  figure.drawn = await vegaEmbed(figure.querySelector("div"), spec, options);
  if (large) figure.drawn.view.addEventListener("click", (_, item) => item?.datum?.text && pin(figure, item.datum));
}

const drawAll = () => Promise.all([...document.querySelectorAll("figure")].map(draw));
unpack(document.getElementById("vega")).then((code) => {
  const script = document.createElement("script"); // the page's policy knows its hash
  script.textContent = code;
  document.head.append(script);
  dark.addEventListener("change", drawAll);
  return drawAll();
});
