// Under the pointer: each line's nearest value, in the caption. The page is complete without it.
for (const svg of document.querySelectorAll("svg.chart")) {
  const [x0, x1, px0, px1, y0, y1, py0, py1] = svg.dataset.scale.split(" ").map(Number);
  const guide = svg.querySelector(".guide"), readout = svg.closest("figure").querySelector("output");
  const show = (v) => svg.dataset.percent === "1" ? (v * 100).toFixed(1) + " %" : Number(v.toPrecision(3)).toString();
  const lines = [...svg.querySelectorAll("polyline[data-label]")].map((line) => ({
    label: line.dataset.label,
    points: line.getAttribute("points").split(" ").map((p) => p.split(",").map(Number)),
  }));
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const px = Math.min(Math.max(at.x, px0), px1);
    guide.setAttribute("x1", px); guide.setAttribute("x2", px); guide.removeAttribute("hidden");
    const share = (px - px0) / (px1 - px0);
    const x = svg.dataset.log === "1" ? x0 * (x1 / x0) ** share : x0 + share * (x1 - x0);
    readout.textContent = "at " + Number(x.toPrecision(3)) + " — " + lines.map(({label, points}) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - px) < Math.abs(a[0] - px) ? b : a);
      return label + " " + show(y0 + (near[1] - py0) / (py1 - py0) * (y1 - y0));
    }).join(" · ");
  });
  svg.addEventListener("pointerleave", () => { guide.setAttribute("hidden", ""); readout.textContent = ""; });
}
