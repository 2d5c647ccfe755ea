// Two evaluations side by side.
themeButton();

function differences() {
  const rows = Object.entries(data.metrics).map(([name, m]) => {
    const reach = Math.max(Math.abs(m.low), Math.abs(m.high), 1e-9) * 1.15;
    const at = (value) => `${50 + (50 * value) / reach}%`;
    const kind = m.b_is === "better" ? "up" : m.b_is === "worse" ? "down" : "soft";
    return [name, fixed(m.a), fixed(m.b), make("span", { class: kind }, (m.difference > 0 ? "+" : "") + fixed(m.difference)),
      make("div", { class: "interval", style: { minWidth: "130px" }, title: `${fixed(m.low, 4)} to ${fixed(m.high, 4)}` },
        make("i", { style: { left: at(m.low), width: `${(50 * (m.high - m.low)) / reach}%` } }),
        make("b", { style: { left: "50%", background: "var(--soft)", width: "1px" } }),
        make("b", { style: { left: at(m.difference) } })),
      fixed(m.p_value), make("span", { class: kind }, m.b_is)];
  });
  const c = data.counts;
  section("differences", "Differences", make("div", { class: "card" },
    table(["", "A", "B", "B − A", "95% interval", "p", "B is"], rows),
    make("p", { class: "soft small" }, `Paired bootstrap over ${number(c.images)} images, ${number(data.resamples)} samples; the thin line is zero. ` +
      `${number(c.same_caption)} captions are identical.` + (c.only_in_a || c.only_in_b ? ` Not compared: ${c.only_in_a} images only in A, ${c.only_in_b} only in B.` : "")),
    data.verdicts.a && data.verdicts.b ? make("p", {}, `A ${data.verdicts.a}; B ${data.verdicts.b}.`) : null));
}

function changed() {
  const items = data.changed_most;
  if (!items.length) return;
  const gain = (item) => item.cider_b - item.cider_a;
  const orders = {
    "changed most": (x, y) => Math.abs(gain(y)) - Math.abs(gain(x)),
    "B better": (x, y) => gain(y) - gain(x),
    "A better": (x, y) => gain(x) - gain(y),
  };
  const cards = items.map((item) => ({ item, node: make("article", { class: "card image-card" },
    item.image ? make("img", { src: item.image, alt: item.references[0], decoding: "async" }) : null,
    make("div", { class: "text" },
      make("div", { class: "pair" },
        make("p", {}, make("span", { class: "soft small" }, `A ${fixed(item.cider_a, 2)}`), make("br"), item.a || "(empty)"),
        make("p", {}, make("span", { class: `small ${gain(item) >= 0 ? "up" : "down"}` }, `B ${fixed(item.cider_b, 2)}`), make("br"), make("b", {}, item.b || "(empty)"))),
      make("details", {}, make("summary", {}, "references"), make("ul", {}, item.references.map((text) => make("li", {}, text)))),
      make("p", { class: "soft small mono" }, item.id))) }));
  const grid = make("div", { class: "grid", id: "grid" });
  const order = make("select", { id: "order", "aria-label": "order of the images" }, Object.keys(orders).map((name) => make("option", {}, name)));
  const show = () => grid.replaceChildren(...[...cards].sort((x, y) => orders[order.value](x.item, y.item)).map(({ node }) => node));
  order.addEventListener("change", show);
  section("images", "Images whose captions changed most", make("div", { class: "controls" }, order, make("span", { class: "soft small" }, "A and B show the CIDEr of the image")), grid);
  show();
}

function attention() {
  if (!data.explained.length) return;
  const view = (item, label) => {
    const canvas = make("canvas", { "aria-label": `attention map of ${label}` });
    const words = make("div", { class: "words" });
    const size = item.height * item.width;
    const show = (kind, index) => {
      const source = kind === "word" ? item.word_maps : item.queries ? item.mean_maps : item.norms;
      const start = kind === "word" ? index : item.queries ? item.layers : 0;
      paint(canvas, bytes(source).slice(start * size, (start + 1) * size), item.height, item.width, { strength: 0.8, smooth: true });
      [...words.children].forEach((node, i) => node.setAttribute("aria-pressed", kind === "word" ? i === index + 1 : i === 0));
    };
    words.append(make("button", { type: "button", onclick: () => show("all", 0) }, item.queries ? "mean of queries" : "feature norms"),
      ...item.words.map((word, i) => make("button", { type: "button", onclick: () => show("word", i) }, word)));
    show("all", 0);
    return make("div", {}, make("p", {}, make("b", {}, label + " "), item.caption), make("div", { class: "stage" }, make("img", { src: item.seen, alt: item.caption }), canvas),
      make("div", { style: { marginTop: "8px" } }, words));
  };
  section("attention", "Attention", data.explained.map((pair) => make("div", { class: "card", style: { marginBottom: "14px" } },
    make("div", { class: "two" }, view(pair.a, "A"), view(pair.b, "B")))));
}

differences();
changed();
attention();
if (data.curves.length) section("curves", "Training", make("div", { class: "two curves" }, data.curves.map((panel) => curve(panel.title, panel.lines, null))));
document.documentElement.dataset.ready = "yes";
