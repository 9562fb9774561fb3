"use strict";
// Draws the figures of the data element, in the colours of the theme, and keeps their ticks sensible while one zooms.
const {pictures, runs} = JSON.parse(document.getElementById("data").textContent);
const COLOURS = {
  light: {ink: "#1c2128", quiet: "#667080", grid: "#e8ebef", frame: "#b9c0c9", ground: "#ffffff"},
  dark: {ink: "#e9edf2", quiet: "#98a3b3", grid: "#2a313b", frame: "#4b5563", ground: "#151a21"},
};
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const copy = (value) => JSON.parse(JSON.stringify(value));
const axesOf = (layout) => Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
const hidden = new Set();  // runs, and with several runs what one kind of line is in one picture

function dress(picture, theme) {
  const c = COLOURS[theme];
  const data = picture.data.map((plain) => {
    const trace = copy(plain);
    const meta = trace.meta;
    if (meta.colour) {
      const colour = meta.colour[theme];
      trace.line = {...trace.line, color: colour};
      if (trace.marker) {
        trace.marker.color = meta.ring ? c.ground : colour;
        trace.marker.line = {...trace.marker.line, color: colour};
      }
      if (trace.fill) trace.fillcolor = colour + "33";
    }
    const kind = picture.name + " " + meta.role;
    if (hidden.has(meta.run) || (!meta.helper && hidden.has(kind))) trace.visible = false;
    else if (meta.helper && hidden.has(kind)) trace.visible = "legendonly";
    return trace;
  });
  const layout = copy(picture.layout);
  const titles = layout.annotations.some((a) => a.name === "title");
  const above = axesOf(layout).some((key) => layout[key].side === "top");
  const legend = data.some((trace) => trace.showlegend);
  for (const key of axesOf(layout)) {
    const axis = layout[key];
    axis.minor = {...axis.minor, tickcolor: c.frame};
    Object.assign(axis, {
      gridcolor: c.grid, linecolor: c.frame, tickcolor: c.frame, ticks: axis.ticks ?? "outside", ticklen: 5, showline: true,
      zeroline: false, tickfont: {color: c.quiet, size: 12}, automargin: false, exponentformat: "power",
    });
    axis.title = {...axis.title, standoff: 8, font: {color: c.ink, size: 13}};
  }
  for (const note of layout.annotations) {
    const title = note.name === "title";
    note.font = {size: title ? 13 : 12, color: note.meta ? note.meta[theme] : title ? c.ink : c.quiet};
    delete note.meta;
  }
  Object.assign(layout, {
    font: {family: FONT, color: c.ink}, paper_bgcolor: c.ground, plot_bgcolor: c.ground,
    margin: {l: 68, r: 26, b: 48, t: 14 + (legend || titles ? 24 : 0) + (layout.meta.stacked ? 22 : 0) + (above ? 44 : 0)},
    hovermode: picture.name === "frontier" || picture.name === "firing_density" ? "closest" : "x unified",
    hoverlabel: {bgcolor: c.ground, bordercolor: c.frame, font: {family: FONT, size: 12.5, color: c.ink}},
    dragmode: "zoom",
  });
  for (const key of Object.keys(layout).filter((key) => key.startsWith("legend"))) {
    Object.assign(layout[key], {orientation: layout[key].orientation || "h", font: {size: 12.5}, bgcolor: "rgba(0,0,0,0)"});
  }
  return {data, layout};
}

// The axis above counts other units in the places of the one below: its texts are made here once a reader zooms.
function topTicks(range, perUnit) {
  const [low, high] = range.map((end) => 10 ** end * perUnit);
  const factors = high / low > 1000 ? [1] : high / low > 10 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
  const vals = [], text = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value < low || value > high) continue;
      vals.push(value / perUnit);
      const [unit, name] = value >= 1e9 ? [1e9, "G"] : value >= 1e6 ? [1e6, "M"] : value >= 1e3 ? [1e3, "k"] : [1, ""];
      text.push(+(value / unit).toPrecision(4) + name);
    }
  }
  return {tickvals: vals, ticktext: text};
}

function fitTicks(plot, picture) {
  const changes = {};
  for (const key of axesOf(picture.layout)) {
    const first = picture.layout[key], now = plot.layout[key];
    const whole = now.type === first.type && now.range.every((end, i) => Math.abs(end - first.range[i]) < 1e-9);
    if (first.side === "top") {
      const ticks = whole ? first : topTicks(now.range, picture.layout.meta.top[key]);
      if (now.ticktext.join() !== ticks.ticktext.join()) {
        changes[key + ".tickvals"] = ticks.tickvals;
        changes[key + ".ticktext"] = ticks.ticktext;
      }
    } else if (now.tickmode !== (whole ? "array" : "auto")) {
      changes[key + ".tickmode"] = whole ? "array" : "auto";
      changes[key + ".minor.tickmode"] = whole ? "array" : "auto";
    }
  }
  if (Object.keys(changes).length) Plotly.relayout(plot, changes);
}

function scaleButtons(section, plot, picture) {
  const yAxes = axesOf(picture.layout).filter((key) => key[0] === "y");
  const types = new Set(yAxes.map((key) => picture.layout[key].type));
  const group = section.querySelector(".scale");
  const first = types.size > 1 ? "as drawn" : [...types][0];
  const names = types.size > 1 ? ["as drawn", "linear", "log"] : ["linear", "log"];
  if (!picture.data.some((trace) => !trace.meta.helper)) return group.remove();
  for (const name of names) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.setAttribute("aria-pressed", name === first);
    button.addEventListener("click", () => {
      const changes = {};
      for (const key of yAxes) {
        const drawn = picture.layout[key];
        if (name === first || name === drawn.type) {
          changes[key + ".type"] = drawn.type;
          changes[key + ".range"] = [...drawn.range];
        } else {
          changes[key + ".type"] = name;
          changes[key + ".autorange"] = true;
        }
      }
      Plotly.relayout(plot, changes);
      for (const other of group.children) other.setAttribute("aria-pressed", other === button);
    });
    group.append(button);
  }
}

function currentTheme() {
  return document.documentElement.dataset.theme;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "light" : "dark";
}

function redraw() {
  return Promise.all(pictures.map((picture) => {
    const {data, layout} = dress(picture, currentTheme());
    const plot = document.querySelector(`#${picture.name} .plot`);
    if (plot.layout) {  // what the reader zoomed into stays, and what a click in a legend has hidden
      data.forEach((trace, i) => {
        if (plot.data[i].visible === "legendonly" && !trace.meta.helper && trace.visible !== false) trace.visible = "legendonly";
      });
      for (const key of axesOf(layout)) {
        for (const part of ["type", "range", "tickmode", "tickvals", "ticktext"]) layout[key][part] = plot.layout[key][part];
      }
    }
    return Plotly.react(plot, data, layout, {
      responsive: true, displayModeBar: false, doubleClick: "reset",
    });
  }));
}

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click", () => {
  setTheme(currentTheme() === "dark" ? "light" : "dark");
  redraw();
});
for (const button of document.querySelectorAll(".runs button")) {
  button.addEventListener("click", () => {
    const run = Number(button.dataset.run);
    if (!hidden.delete(run)) hidden.add(run);
    button.setAttribute("aria-pressed", !hidden.has(run));
    redraw();
  });
}
redraw().then(() => {
  for (const picture of pictures) {
    const section = document.getElementById(picture.name), plot = section.querySelector(".plot");
    scaleButtons(section, plot, picture);
    plot.on("plotly_relayout", () => fitTicks(plot, picture));
    plot.on("plotly_legendclick", ({curveNumber}) => {  // a key of dash or marker stands for the lines of all runs
      const meta = picture.data[curveNumber].meta, kind = picture.name + " " + meta.role;
      if (!meta.helper || !meta.role) return true;
      if (!hidden.delete(kind)) hidden.add(kind);
      redraw();
      return false;
    });
  }
  document.documentElement.dataset.drawn = "true";
});
