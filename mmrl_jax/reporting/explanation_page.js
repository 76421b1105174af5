"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const episodes = all("[data-outcome]");
const opacity = document.getElementById("opacity");

opacity.addEventListener("input", () => {
  document.documentElement.style.setProperty("--opacity", opacity.value / 100);
});

for (const radio of all("[name=filter]")) {
  radio.addEventListener("change", () => {
    for (const episode of episodes) {
      episode.hidden = radio.value !== "all" && episode.dataset.outcome !== radio.value;
    }
    const shown = episodes.filter((episode) => !episode.hidden).length;
    document.getElementById("count").value = `${shown} of ${episodes.length} episodes`;
  });
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name.replace(/[^A-Za-z0-9._-]+/g, "-");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

document.getElementById("save-numbers").addEventListener("click", () => {
  const text = document.getElementById("numbers").textContent;
  save(new Blob([text], { type: "application/json" }), `${document.title}.json`);
});

// A canvas can draw an SVG only as a separate file, to which the style of the page does not apply.
async function chartImage(svg) {
  const copy = svg.cloneNode(true);
  const parts = all("*", svg);
  all("*", copy).forEach((part, i) => {
    const style = getComputedStyle(parts[i]);
    for (const name of ["stroke", "fill", "font-size", "font-family"]) {
      part.style.setProperty(name, style.getPropertyValue(name));
    }
  });
  const box = svg.getBoundingClientRect();
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", box.width);
  copy.setAttribute("height", box.height);
  const image = new Image();
  image.src = "data:image/svg+xml," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
  await image.decode();
  return image;
}

function drawText(context, node, origin) {
  const style = getComputedStyle(node.parentElement);
  context.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
  context.fillStyle = style.color;
  context.textBaseline = "middle";
  // Each word is drawn where the page has it, because lines are wrapped.
  for (const match of node.data.matchAll(/\S+/g)) {
    const range = document.createRange();
    range.setStart(node, match.index);
    range.setEnd(node, match.index + match[0].length);
    const box = range.getBoundingClientRect();
    if (box.width) {
      context.fillText(match[0], box.x - origin.x, box.y - origin.y + box.height / 2);
    }
  }
}

// Draws a figure as the page shows it, with the chosen opacity, at twice its size.
async function figureImage(figure) {
  const origin = figure.getBoundingClientRect();
  const canvas = document.createElement("canvas");
  canvas.width = 2 * origin.width;
  canvas.height = 2 * origin.height;
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.imageSmoothingEnabled = false;
  const walker = document.createTreeWalker(figure, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT, {
    acceptNode: (node) =>
      node.parentElement.closest("svg, button") || node.matches?.("button")
        ? NodeFilter.FILTER_REJECT
        : NodeFilter.FILTER_ACCEPT,
  });
  for (let node = figure; node; node = walker.nextNode()) {
    if (node.nodeType === Node.TEXT_NODE) {
      drawText(context, node, origin);
      continue;
    }
    const box = node.getBoundingClientRect();
    const style = getComputedStyle(node);
    const area = [box.x - origin.x, box.y - origin.y, box.width, box.height];
    context.fillStyle = style.backgroundColor;
    context.fillRect(...area);
    context.globalAlpha = style.opacity;
    if (node.matches("img")) context.drawImage(node, ...area);
    if (node.matches("svg")) context.drawImage(await chartImage(node), ...area);
    context.globalAlpha = 1;
  }
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

for (const button of all(".save")) {
  button.addEventListener("click", async () => {
    const figure = button.closest(".figure");
    save(await figureImage(figure), `${document.title}-${figure.getAttribute("aria-label")}.png`);
  });
}
