// The report of one evaluation.
themeButton();

function headline() {
  const scale = (tile) => Math.max(tile.high ?? tile.value, tile.before ?? 0, tile.full ?? 1) || 1;
  const tiles = data.tiles.map((tile) => make("div", { class: "card tile" },
    make("div", { class: "name" }, tile.name),
    make("div", { class: "value" }, fixed(tile.value)),
    tile.low === undefined ? null : [
      make("div", { class: "interval", title: "95% interval over images" },
        make("i", { style: { left: `${(100 * tile.low) / scale(tile)}%`, width: `${Math.max(1, (100 * (tile.high - tile.low)) / scale(tile))}%` } }),
        make("b", { style: { left: `calc(${(100 * tile.value) / scale(tile)}% - 1px)` } })),
      make("div", { class: "range" }, `${fixed(tile.low)} to ${fixed(tile.high)}`)],
    tile.note ? make("div", { class: "range" }, tile.note) : null,
    tile.before === undefined ? null : make("div", { class: "was" }, `before: ${fixed(tile.before)}`)));
  section("numbers", "Numbers", make("div", { class: "tiles" }, tiles),
    data.notes.length ? make("p", { class: "soft small" }, data.notes.map((note) => note.replace(/\.?$/, ".")).join(" ")) : null);
}

function imageUse() {
  const use = data.image_use;
  if (!use) return;
  const kind = use.verdict.startsWith("ignores") ? "bad" : use.verdict.startsWith("hardly") ? "warn" : "";
  const conditions = ["right", "shuffled", "black", "none"].filter((c) => c in use.loss);
  const names = { right: "the right image", shuffled: "another image", black: "a black image", none: "no image" };
  const columns = ["loss", "CIDEr", "VQA accuracy"].filter((c) => use[c]);
  const largest = Object.fromEntries(columns.map((c) => [c, Math.max(...Object.values(use[c]), 1e-9)]));
  const rows = conditions.map((condition) => [names[condition], ...columns.map((c) => [
    make("span", { class: "bar", style: { width: `${Math.max(2, (70 * (use[c][condition] ?? 0)) / largest[c])}px` } }), fixed(use[c][condition])])]);
  section("image-use", "Image use",
    make("div", { class: `card verdict ${kind}`, id: "verdict" }, make("strong", {}, `This model ${use.verdict}.`),
      make("p", {}, use.because),
      table(["given", ...columns.map((c) => (c === "loss" ? "loss, nats per token (lower is better)" : c))], rows),
      make("p", { class: "soft small" }, `Measured on ${number(use.images)} images. A model that uses its image has a higher loss with any other.`)));
}

function captionNode(item) {
  const node = make("p", { class: "caption" });
  const wrong = new Set(item.wrong_words ?? []);
  item.caption.split(/(\s+)/).forEach((part) => {
    const word = part.toLowerCase().replace(/[^a-z]/g, "");
    node.append(wrong.has(word) ? make("mark", { title: "not in the image" }, part) : part);
  });
  if (!item.caption) node.append(make("span", { class: "soft" }, "(empty)"));
  return node;
}

function images() {
  if (!data.gallery.length) return;
  const score = (item) => item.scores.CIDEr ?? item.scores.exact ?? 0;
  const orders = {
    "best first": (a, b) => score(b) - score(a),
    "worst first": (a, b) => score(a) - score(b),
    "most hallucinations": (a, b) => b.hallucinated - a.hallucinated || score(a) - score(b),
    "longest caption": (a, b) => b.caption.length - a.caption.length,
    "order of the data set": (a, b) => a.index - b.index,
  };
  if (data.gallery.some((item) => item.before !== undefined)) {
    orders["most improved"] = (a, b) => score(b) - (b.before_score ?? 0) - (score(a) - (a.before_score ?? 0));
  }
  const grid = make("div", { class: "grid", id: "grid" });
  const cards = data.gallery.map((item) => ({ item, node: make("article", { class: "card image-card" },
    make("img", { src: item.image, alt: item.caption, decoding: "async" }),
    make("div", { class: "text" },
      captionNode(item),
      item.before === undefined ? null : make("p", { class: "was-caption" }, "before: " + (item.before || "(empty)")),
      make("div", { class: "chips" },
        Object.entries(item.scores).map(([name, value]) => make("span", { class: "chip" }, `${name} ${fixed(value, 2)}`)),
        item.true === undefined ? null : make("span", { class: `chip ${item.true ? "good" : "bad"}` }, item.true ? "true" : "not true"),
        item.hallucinated ? make("span", { class: "chip bad" }, `${item.hallucinated} hallucinated`) : null,
        item.ended === false ? make("span", { class: "chip bad" }, "cut off") : null,
        item.copied ? make("span", { class: "chip" }, "caption of the memory") : null,
        item.group ? make("span", { class: "chip" }, item.group) : null),
      item.problems && item.problems.length ? make("p", { class: "soft small" }, item.problems.join("; ")) : null,
      make("details", {}, make("summary", {}, `${item.references.length} reference${item.references.length === 1 ? "" : "s"}`),
        make("ul", {}, item.references.map((text) => make("li", {}, text)))),
      item.neighbours && item.neighbours.length ? make("details", { class: "neighbours" }, make("summary", {}, "nearest in the memory"),
        make("ul", {}, item.neighbours.map((n) => make("li", {}, `${fixed(n.similarity, 2)} ${n.id}: ${n.captions.join(" / ")}`)))) : null,
      item.answers && item.answers.length ? make("details", {}, make("summary", {}, `${item.answers.length} question${item.answers.length === 1 ? "" : "s"}`),
        make("ul", {}, item.answers.map((a) => make("li", {}, `${a.question} `, make("b", { class: a.exact ? "up" : "down" }, a.text || "(empty)"),
          a.exact ? "" : ` (${a.people[0]})`)))) : null,
      make("p", { class: "soft small mono" }, item.id))) }));
  const find = make("input", { type: "search", placeholder: "search captions", "aria-label": "search captions" });
  const order = make("select", { id: "order", "aria-label": "order of the images" }, Object.keys(orders).map((name) => make("option", {}, name)));
  const count = make("span", { class: "soft small", "aria-live": "polite" });
  const FEW = 12;
  let all = false;
  const more = make("button", { type: "button", id: "more", onclick: () => { all = true; show(); } });
  const show = () => {
    const wanted = find.value.toLowerCase();
    const shown = cards.filter(({ item }) => [item.caption, ...item.references].some((text) => text.toLowerCase().includes(wanted)))
      .sort((a, b) => orders[order.value](a.item, b.item));
    const visible = all ? shown : shown.slice(0, FEW);
    grid.replaceChildren(...visible.map(({ node }) => node));
    more.hidden = visible.length === shown.length;
    more.textContent = `show all ${shown.length}`;
    count.textContent = `${visible.length} of ${shown.length} images, chosen from ${data.images.toLocaleString("en")}`;
  };
  order.addEventListener("change", show);
  find.addEventListener("input", show);
  section("images", "Images", make("div", { class: "controls" }, order, find, count), grid,
    make("div", { class: "controls" }, more));
  show();
}

function explorer() {
  const items = data.explained;
  if (!items.length) return;
  const state = { item: 0, kind: "word", index: 0, layer: -1, strength: 0.8, smooth: true };
  const image = make("img", { alt: "the image as the encoder saw it" });
  const canvas = make("canvas", { id: "map", "aria-label": "attention map" });
  const title = make("p", { class: "soft small", id: "map-title", "aria-live": "polite" });
  const words = make("div", { class: "words", id: "words" });
  const queries = make("div", { class: "queries", id: "queries" });
  const layers = make("select", { id: "layer", "aria-label": "layer" });
  const caption = make("p", { class: "caption" });
  const thumbs = make("div", { class: "thumbs" });
  const cache = new Map();
  const maps = (text) => {
    if (!cache.has(text)) cache.set(text, bytes(text));
    return cache.get(text);
  };
  const slice = (text, index, size) => maps(text).slice(index * size, (index + 1) * size);

  function current() {
    const item = items[state.item], size = item.height * item.width;
    if (state.kind === "norm") return [slice(item.norms, 0, size), "norm of each patch feature"];
    if (state.kind === "word") {
      return [slice(item.word_maps, state.index, size), `attention of the word “${item.words[state.index]}” (gradient × attention)`];
    }
    const layer = state.layer < 0 ? item.layers : state.layer;
    const where = state.layer < 0 ? "mean over layers" : `cross-attention layer ${state.layer + 1}`;
    if (state.kind === "mean") return [slice(item.mean_maps, layer, size), `mean of all queries, ${where}`];
    return [slice(item.query_maps, layer * item.queries + state.index, size), `query ${state.index + 1}, ${where}, mean of heads`];
  }

  function show() {
    const item = items[state.item];
    const [values, text] = current();
    paint(canvas, values, item.height, item.width, state);
    title.textContent = `${text}; grid ${item.height} × ${item.width}`;
    for (const [i, node] of [...words.children].entries()) node.setAttribute("aria-pressed", state.kind === "word" && i === state.index);
    for (const node of queries.children) {
      const on = node.dataset.kind === state.kind && (state.kind !== "query" || Number(node.dataset.index) === state.index);
      node.setAttribute("aria-pressed", on);
    }
    for (const [i, node] of [...thumbs.children].entries()) node.setAttribute("aria-pressed", i === state.item);
  }

  function choose(index) {
    const item = items[index];
    Object.assign(state, { item: index, index: 0, layer: -1, kind: item.words.length ? "word" : item.queries ? "mean" : "norm" });
    image.src = item.seen;
    caption.textContent = item.caption;
    words.replaceChildren(...item.words.map((word, i) => make("button", { type: "button", onclick: () => { Object.assign(state, { kind: "word", index: i }); show(); } }, word)));
    const special = [["mean", "mean of queries", item.queries], ["norm", "feature norms", 1]].filter(([, , there]) => there)
      .map(([kind, text]) => make("button", { type: "button", "data-kind": kind, onclick: () => { state.kind = kind; show(); } }, text));
    const each = Array.from({ length: item.queries }, (_, i) => make("button", {
      type: "button", "data-kind": "query", "data-index": i, class: data.queries && data.queries.dead.includes(i) ? "flat" : null,
      onclick: () => { Object.assign(state, { kind: "query", index: i }); show(); } }, `${i + 1}`));
    queries.replaceChildren(...special, ...each);
    layers.replaceChildren(make("option", { value: -1 }, "mean over layers"),
      ...Array.from({ length: item.layers }, (_, i) => make("option", { value: i }, `layer ${i + 1}`)));
    layers.hidden = !item.layers;
    show();
  }

  layers.addEventListener("change", () => {
    state.layer = Number(layers.value);
    if (state.kind === "word" || state.kind === "norm") state.kind = "mean";
    show();
  });
  const strength = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: state.strength, "aria-label": "strength of the map",
    oninput: (event) => { state.strength = Number(event.target.value); show(); } });
  const smooth = make("input", { type: "checkbox", id: "smooth", checked: true, onchange: (event) => { state.smooth = event.target.checked; show(); } });
  thumbs.append(...items.map((item, i) => make("button", { type: "button", "aria-label": item.caption, onclick: () => choose(i) }, make("img", { src: item.seen, alt: "" }))));
  section("attention", "Attention",
    make("p", { class: "soft" }, "Choose a word or a query. The image is shown as the encoder saw it, resized and cropped. The maps have the encoder's own grid."),
    make("div", { class: "card" }, thumbs, make("div", { class: "explorer" },
      make("div", {}, make("div", { class: "stage" }, image, canvas), title,
        make("div", { class: "legend" }, "low", make("i", { style: { background: GRADIENT } }), "high"),
        make("div", { class: "controls small" }, make("label", {}, "strength ", strength), make("label", {}, smooth, " smooth"))),
      make("div", {}, caption, make("h3", {}, "Words"), words, make("h3", {}, "Queries"), make("div", { class: "controls" }, layers), queries))));
  choose(0);
  queryStatistics();
}

function queryStatistics() {
  const q = data.queries;
  if (!q) return;
  const canvas = make("canvas", { class: "matrix", "aria-label": "overlap of queries" });
  const count = q.entropy.length;
  paint(canvas, q.overlap.flat().map((v) => 255 * v), count, count, { opaque: true });
  const words = [];
  words.push(q.dead.length ? `${q.dead.length} of ${count} queries attend uniformly (${q.dead.map((i) => i + 1).join(", ")}).` : "No query attends uniformly.");
  words.push(q.identical.length ? `${q.identical.length} pair${q.identical.length === 1 ? " has" : "s have"} the same map, such as ${q.identical[0].map((i) => i + 1).join(" and ")}.` : "No two queries have the same map.");
  document.getElementById("attention").append(make("div", { class: "two", style: { marginTop: "16px" } },
    make("div", { class: "card" }, make("h3", {}, "Overlap of queries"), make("p", { class: "soft small" }, `Mean ${number(q.mean_overlap)}: 1 is the same map, 0 is no overlap. ${words.join(" ")}`), canvas,
      make("div", { class: "legend" }, "0", make("i", { style: { background: GRADIENT } }), "1")),
    make("div", { class: "card" }, make("h3", {}, "Entropy of each query"), make("p", { class: "soft small" }, "1 is a uniform map, 0 a single patch."),
      make("div", { class: "scroll" }, make("div", { style: { display: "flex", alignItems: "flex-end", gap: "2px", height: "150px" } },
        q.entropy.map((e, i) => make("div", { title: `query ${i + 1}: ${number(e)}`, style: { flex: "1 0 5px", height: `${Math.max(1, 100 * e)}%`, background: e > 0.98 ? "var(--bad)" : "var(--accent)", borderRadius: "2px 2px 0 0" } })))))));
}

function retrieval() {
  const r = data.retrieval;
  if (!r) return;
  const names = { image_to_text: "image → text", text_to_image: "text → image" };
  const rows = [];
  for (const [key, values] of [["", r], ["re-ranked, ", r.reranked], ["chance, ", r.chance], ["frozen encoder, zero-shot, ", r.encoder_zero_shot]]) {
    if (!values) continue;
    for (const way of Object.keys(names)) {
      if (values[way]) rows.push([key + names[way], ...["R@1", "R@5", "R@10", "median_rank"].map((n) => (n === "median_rank" ? number(values[way][n], 1) : fixed(values[way][n])))]);
    }
  }
  const parts = [table(["", "R@1", "R@5", "R@10", "median rank"], rows)];
  if (r.grid) {
    const n = r.grid.captions.length;
    const flat = r.grid.scores.flat(), low = Math.min(...flat), high = Math.max(...flat);
    const grid = make("div", { class: "similar", style: { gridTemplateColumns: `70px repeat(${n}, 1fr)` } }, make("span"),
      r.grid.captions.map((text) => make("div", { class: "label", title: text }, text)));
    r.grid.scores.forEach((row, i) => {
      grid.append(make("img", { src: r.grid.images[i], alt: r.grid.captions[i] }));
      row.forEach((value, j) => {
        const c = colour((value - low) / (high - low || 1));
        const light = c[0] * 0.3 + c[1] * 0.59 + c[2] * 0.11 > 130;
        grid.append(make("div", { class: `cell${i === j ? " own" : ""}`, style: { background: `rgb(${c})`, color: light ? "#111" : "#fff" } }, number(value, 2)));
      });
    });
    parts.push(make("h3", {}, "Similarity of images and captions"), make("p", { class: "soft small" }, "The framed diagonal holds the right pairs."), make("div", { class: "scroll" }, grid));
  }
  section("retrieval", "Retrieval", make("div", { class: "card" }, parts));
}

function answers() {
  if (data.vqa) {
    const rows = Object.entries(data.vqa.by_question_type).slice(0, 14).map(([name, v]) => [name + " …", number(v.questions), fixed(v.accuracy), `${v.most_frequent_answer}: ${fixed(v.most_frequent_accuracy)}`]);
    section("vqa", "Questions", make("div", { class: "card" }, table(["question", "asked", "accuracy", "most frequent answer: its accuracy"], rows)));
  }
  if (data.conversations.length) {
    const rows = data.conversations.map((c) => [make("span", { style: { whiteSpace: "pre-wrap" } }, c.context),
      c.right ? c.answer : make("mark", {}, c.answer || "(empty)"), c.reference]);
    section("conversations", "Conversations", make("div", { class: "card" }, table(["conversation", "answer", "reference"], rows)));
  }
  if (data.places.length) {
    const grid = make("div", { class: "grid" });
    const cards = data.places.map((item) => ({ item, node: make("article", { class: "card image-card" },
      make("img", { src: item.image, alt: item.answer, decoding: "async" }),
      make("div", { class: "text" }, make("p", {}, item.question, " ", make("b", {}, item.answer || "(empty)")),
        make("div", { class: "chips" }, make("span", { class: `chip ${item.iou >= 0.5 ? "good" : "bad"}` }, `IoU ${fixed(item.iou, 2)}`)),
        make("p", { class: "soft small mono" }, item.id))) }));
    const order = make("select", { "aria-label": "order of the boxes" }, ["best IoU first", "worst IoU first"].map((name) => make("option", {}, name)));
    const show = () => grid.replaceChildren(...cards.toSorted((a, b) => (order.selectedIndex ? 1 : -1) * (a.item.iou - b.item.iou)).map(({ node }) => node));
    order.addEventListener("change", show);
    show();
    section("places", "Boxes", make("p", { class: "soft" }, "The true box is dashed."), order, grid);
  }
  if (data.pope) {
    const rows = Object.entries(data.pope).filter(([, v]) => v.accuracy !== undefined)
      .map(([name, v]) => [name, ...["accuracy", "precision", "recall", "F1", "yes_share"].map((k) => fixed(v[k])), number(v.questions)]);
    section("pope", "POPE", make("div", { class: "card" }, table(["absent objects", "accuracy", "precision", "recall", "F1", "answers yes", "questions"], rows)));
  }
}

function routing() {
  const r = data.routing;
  if (!r) return;
  const rows = r.mean_probability.map((p, i) => [`expert ${i + 1}`,
    [make("span", { class: "bar", style: { width: `${Math.max(2, 120 * p)}px` } }), number(p)], number(r.share_of_images[i])]);
  const examples = data.explained.filter((item) => item.router).map((item) => make("div", { style: { display: "flex", gap: "10px", alignItems: "center", margin: "6px 0" } },
    make("img", { src: item.seen, alt: item.caption, style: { width: "54px", height: "54px", objectFit: "cover", borderRadius: "6px" } }),
    make("div", { style: { flex: 1, display: "flex", height: "16px", borderRadius: "4px", overflow: "hidden" } },
      item.router.map((p, i) => make("i", { title: `expert ${i + 1}: ${number(p)}`, style: { width: `${100 * p}%`, background: LINES[i % LINES.length] } })))));
  section("routing", "Experts", make("div", { class: "two" },
    make("div", { class: "card" }, table(["", "mean probability", "share of images"], rows),
      make("p", { class: "soft small" }, `Mean entropy ${number(r.mean_entropy)}, maximum ${number(r.largest_entropy)}. At 0 each image uses one expert.`)),
    examples.length ? make("div", { class: "card" }, make("h3", {}, "By image"), examples) : null));
}

function curves() {
  if (!data.curves.length) return;
  section("curves", "Training", make("div", { class: "two curves" }, data.curves.map((panel) => curve(panel.title, panel.lines, data.chosen_step))));
}

function provenance() {
  section("provenance", "Provenance",
    make("div", { class: "two" },
      make("div", { class: "card" }, make("h3", {}, "What was measured"), definition(Object.entries(data.measured))),
      make("div", { class: "card" }, make("h3", {}, "Settings"), definition(Object.entries(data.settings)))),
    make("div", { class: "card", style: { marginTop: "16px" } }, make("h3", {}, "All numbers"),
      make("details", {}, make("summary", {}, "metrics.json"), make("pre", { class: "small mono", style: { overflow: "auto", maxHeight: "420px" } }, JSON.stringify(data.metrics, null, 1)))));
}

headline();
imageUse();
images();
explorer();
retrieval();
answers();
routing();
curves();
provenance();
document.documentElement.dataset.ready = "yes";
