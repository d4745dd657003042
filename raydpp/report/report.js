// Draws every figure from the specification that stands in it, again when the screen turns dark or light.
const dark = matchMedia("(prefers-color-scheme: dark)");
const configs = JSON.parse(document.getElementById("configs").textContent);

async function draw(figure) {
  figure.drawn?.finalize();
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const options = {
    actions: false, ast: true, config: configs[+dark.matches], defaultStyle: false, renderer: "svg",
    tooltip: { disableDefaultStyle: true },
  };
  figure.drawn = await vegaEmbed(figure.querySelector("div"), spec, options);
}

const drawAll = () => Promise.all([...document.querySelectorAll("figure")].map(draw));
dark.addEventListener("change", drawAll);
drawAll();
