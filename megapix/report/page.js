// The value of each line under the pointer: a polyline's points are pixels, and the chart says what they stand for.
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const read = svg.nextElementSibling, mark = svg.querySelector(".at")
  const [first, last] = svg.dataset.x.split(" ").map(Number), [low, high, log] = svg.dataset.y.split(" ").map(Number)
  const [left, top, right, bottom] = svg.dataset.box.split(" ").map(Number)
  const lines = [...svg.querySelectorAll("polyline")].map(line => ({
    tag: line.dataset.tag.split("/").pop(), points: line.getAttribute("points").split(" ").map(p => p.split(",").map(Number)),
  }))
  const value = y => {
    const share = (bottom - y) / (bottom - top)
    return log ? low * (high / low) ** share : low + share * (high - low)
  }
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width
    if (!lines.length) return
    const near = points => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)
    const at = near(lines[0].points)[0]
    mark.setAttribute("d", `M${at} ${top}V${bottom}`)
    const step = Math.round(first + (at - left) / (right - left) * (last - first))
    const shown = lines.slice(0, 8).map(line => `${line.tag} ${value(near(line.points)[1]).toPrecision(3)}`)
    read.textContent = `step ${step.toLocaleString("en")}: ${shown.join(", ")}`
  })
  svg.addEventListener("pointerleave", () => { mark.setAttribute("d", ""); read.textContent = "" })
}
