// Charts in the colours of the page, drawn when they come into view; links to the sections.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function theme() {
    const ink = colour("--ink"), dim = colour("--dim"), line = colour("--line");
    return {
      ...JSON.parse(document.getElementById("theme").textContent),
      background: null,
      style: { text: { fill: ink }, "guide-label": { fill: dim }, "guide-title": { fill: dim } },
      text: { color: ink },
      axis: { labelFontSize: 11, titleFontSize: 11, titleFontWeight: 400, tickSize: 4,
              labelColor: dim, titleColor: dim, domainColor: line, tickColor: line, gridColor: line, gridOpacity: 0.6 },
    };
  }

  async function draw(figure) {
    const spec = JSON.parse(figure.querySelector("script.spec").textContent);
    const place = figure.querySelector(".chart");
    // ast: expressions are interpreted, so that the page needs no eval
    const options = { actions: false, ast: true, renderer: "canvas", config: theme(), tooltip: { theme: dark.matches ? "dark" : "light" } };
    figure.drawn = vegaEmbed(place, spec, options);
    try { await figure.drawn; } catch (error) { place.textContent = "This chart could not be drawn: " + error.message; console.error(error); }
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "300px" });
  const figures = [...document.querySelectorAll("figure")].filter((f) => f.querySelector("script.spec"));
  figures.forEach((figure) => seen.observe(figure));
  dark.addEventListener("change", () => figures.filter((f) => f.drawn).forEach(draw));
  addEventListener("beforeprint", () => figures.filter((f) => !f.drawn).forEach(draw));

  const nav = document.getElementById("nav");
  for (const part of document.querySelectorAll("section[id]")) {
    const link = document.createElement("a");
    link.href = "#" + part.id;
    link.textContent = part.querySelector("h2").textContent;
    nav.append(link);
  }
  const every = Number(document.body.dataset.reload);
  if (every) setTimeout(() => location.reload(), 1000 * every);
})();
