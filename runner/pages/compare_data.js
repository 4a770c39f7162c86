"use strict";
// What a comparison computes from the rows of its runs: groups over seeds, labels, means, curves, Pareto fronts.
// Pure functions of plain data; see runner/pages/entries.py for what a row holds.
const Comparison = (() => {
  const CHOICES = ["model.name", "quant.name", "dataset.name", "classifier.name", "regularizer.name"];
  const MOST_IN_LABEL = 3;
  // Keys of the network, and of a data set those that say which images it has, not how they are trained on.
  const OF_TASK = /^(model\.|dataset\.(?!augment\.|(drop_last|input_size|mean|std)$))/;
  const valueOf = (run, key, base) => key === "state" ? run.state : key in run.settings ? run.settings[key] : base[key] ?? null;
  const known = (values) => values.filter((value) => value !== null && value !== undefined);
  const unique = (values) => [...new Set(values)];

  // Numbers in the order of numbers, also those within words (lr=0.03 before lr=0.1), what is missing last.
  function inOrder(a, b) {
    if (a === null || b === null) return (a === null) - (b === null);
    if (!Number.isNaN(a - b)) return a - b;
    const [left, right] = [a, b].map((value) => String(value).split(/(\d+(?:\.\d+)?(?:e[+-]?\d+)?)/));
    const place = left.findIndex((part, index) => part !== right[index]);
    if (place < 0) return left.length - right.length;
    const [x, y] = [left[place], right[place] ?? ""];
    return place % 2 && y ? x - y || x.localeCompare(y) : x.localeCompare(y);
  }

  // A run without a config is told from all others by its name; a key that it does not know is none in which it differs.
  const tells = (run, key, base) => valueOf(run, key, base) !== null || valueOf(run, "run", base) === null;

  // The keys in which runs differ, choices of a whole component first.
  function differingKeys(runs, base) {
    const candidates = unique(runs.flatMap((run) => Object.keys(run.settings)));
    const differing = candidates.filter((key) => {
      const knowing = runs.filter((run) => tells(run, key, base));
      return knowing.some((run) => valueOf(run, key, base) !== valueOf(knowing[0], key, base));
    });
    const rank = (key) => (CHOICES.indexOf(key) + CHOICES.length + 1) % (CHOICES.length + 1);
    return differing.sort((a, b) => rank(a) - rank(b) || inOrder(a, b));
  }

  function stats(values) {
    const numbers = known(values);
    const n = numbers.length;
    if (!n) return {n, mean: null, sd: null};
    const mean = numbers.reduce((sum, value) => sum + value, 0) / n;
    const squares = numbers.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    return {n, mean, sd: n > 1 ? Math.sqrt(squares / (n - 1)) : null};
  }

  // Runs that differ in nothing but the seed are one configuration.
  function grouped(runs, keys, base) {
    const settings = keys.filter((key) => key !== "seed");
    const groups = new Map();
    for (const run of runs) {
      const values = settings.map((key) => valueOf(run, key, base));
      const id = JSON.stringify(values);
      if (!groups.has(id)) groups.set(id, {id, runs: [], values: Object.fromEntries(settings.map((key, i) => [key, values[i]]))});
      groups.get(id).runs.push(run);
    }
    for (const group of groups.values()) group.runs = oneEachSeed(group.runs);
    return named([...groups.values()], settings, base);
  }

  // The same configuration and seed again, under another name, is no further sample: the newest finished run of a seed counts.
  function oneEachSeed(runs) {
    const counting = new Map();
    const rank = (run) => `${run.state === "done" ? 1 : 0} ${run.updated}`;
    for (const run of runs) {
      const seed = run.seed || run.id;  // where no file tells it, nothing says that it is the same
      const other = counting.get(seed);
      if (!other || rank(run) > rank(other)) counting.set(seed, run);
    }
    return [...counting.values()].sort((a, b) => inOrder(a.seed, b.seed));  // the same seeds are to read the same in all groups
  }

  // Short names: the choices that differ, then the keys in which configurations of the same choices still differ.
  function named(groups, keys, base) {
    const choices = keys.filter((key) => CHOICES.includes(key));
    const family = (group) => JSON.stringify(choices.map((key) => group.values[key]));
    for (const members of groupBy(groups, family).values()) {
      const own = telling(members.filter((group) => !group.values.run), keys.filter((key) => !choices.includes(key)));
      const taken = new Map();
      for (const group of members) {
        const words = choices.map((key) => word(key, group.values[key] ?? "—"));
        const details = group.values.run ? [`run=${group.values.run}`]
          : own.map((key) => `${key.split(".").slice(1).join(".") || key}=${short(group.values[key])}`);
        const label = [...words, ...details].join(" ") || base["quant.name"] || group.runs[0].name;
        taken.set(label, (taken.get(label) ?? 0) + 1);
        group.label = taken.get(label) > 1 ? `${label} (${taken.get(label)})` : label;
      }
    }
    return groups.sort((a, b) => inOrder(a.label, b.label));
  }

  // "none" alone is taken for a quantizer.
  const word = (key, value) => value === "none" && key !== "quant.name" ? `${key.split(".")[0]}=none` : value;

  // The keys in which groups differ; where these are many, the few that tell the groups apart.
  function telling(groups, keys) {
    const kinds = (some) => unique(groups.map((group) => JSON.stringify(some.map((key) => group.values[key])))).length;
    const differing = keys.filter((key) => kinds([key]) > 1);
    if (differing.length <= MOST_IN_LABEL) return differing;
    const chosen = [];
    while (chosen.length < MOST_IN_LABEL && kinds(chosen) < groups.length) {
      const gains = differing.map((key) => kinds([...chosen, key]));
      chosen.push(differing[gains.indexOf(Math.max(...gains))]);
    }
    return chosen;
  }

  // In a label a number needs no more digits than tell it from others.
  function short(value) {
    const number = Number(value ?? "x");
    return Number.isNaN(number) || String(value).length < 9 ? value ?? "—" : String(Number(number.toPrecision(3)));
  }

  function groupBy(items, key) {
    const groups = new Map();
    for (const item of items) {
      const kind = key(item);
      if (!groups.has(kind)) groups.set(kind, []);
      groups.get(kind).push(item);
    }
    return groups;
  }

  // What a run has reached that is not finished says little beside those that are: it counts where there is nothing else.
  function withFigures(group) {
    const finished = group.runs.filter((run) => run.state === "done");
    const mean = (runs, part, key) => stats(runs.map((run) => run[part][key]));
    group.reached = Object.fromEntries(["test", "best", "last"].map((key) =>
      [key, mean(finished.length ? finished : group.runs, "reached", key)]));
    group.costs = Object.fromEntries(Object.keys(group.runs[0].costs).map((key) => [key, mean(group.runs, "costs", key)]));
    group.epochs = Math.max(...group.runs.map((run) => run.epochs));
    return group;
  }

  // The value of a curve at an epoch, between its points on a straight line, outside of them nothing.
  function at(curve, name, epoch) {
    const epochs = curve.epoch;
    if (!epochs?.length || !curve[name] || epoch < epochs[0] || epoch > epochs[epochs.length - 1]) return null;
    let right = epochs.findIndex((candidate) => candidate >= epoch);
    if (epochs[right] === epoch) return curve[name][right];
    const [a, b] = [curve[name][right - 1], curve[name][right]];
    if (a === null || b === null) return null;
    return a + (b - a) * (epoch - epochs[right - 1]) / (epochs[right] - epochs[right - 1]);
  }

  // Mean and band of a group's runs, epoch by epoch; where a seed has ended, or has not got there, the others count.
  function curveOf(group, metric, axis) {
    const curves = group.runs.map((run) => run.curve).filter((curve) => curve[metric] && curve[axis]);
    const epochs = unique(curves.flatMap((curve) => curve.epoch)).sort((a, b) => a - b);
    const xs = positions(curves, axis, epochs);
    const points = [];
    epochs.forEach((epoch, index) => {
      const [x, {n, mean, sd}] = [xs[index], stats(curves.map((curve) => at(curve, metric, epoch)))];
      if (n && x !== null) points.push({x, mean, low: mean - (sd ?? 0), high: mean + (sd ?? 0), n});
    });
    return points;
  }

  // Where on an axis each epoch of a mean curve is. The mean of the times of those that are left would jump where a slow or
  // a fast seed ends, even backwards. So what each epoch took is averaged over the seeds that went through it, and added up:
  // it never goes back, no seed's time is left out, and no more is claimed of a seed than it has done.
  function positions(curves, axis, epochs) {
    let [before, sum] = [curves.map(() => 0), 0];
    return epochs.map((epoch) => {
      const here = curves.map((curve) => at(curve, axis, epoch));
      const {mean} = stats(here.map((place, i) => place === null || before[i] === null ? null : place - before[i]));
      if (mean === null) return null;
      [before, sum] = [here, sum + mean];
      return sum;
    });
  }

  // One front for each network and each set of images: an accuracy on some of the images, or of another network, beats nothing.
  function paretoFronts(points) {
    const task = ({group}) => JSON.stringify(Object.entries(group.values).filter(([key]) => OF_TASK.test(key)));
    return [...groupBy(points, task).values()].map(paretoFront);
  }

  // Those that nothing else beats at the same or a lower cost.
  function paretoFront(points) {
    const front = [];
    for (const point of [...points].sort((a, b) => a.x - b.x || b.y - a.y)) {
      if (!front.length || point.y > front[front.length - 1].y) front.push(point);
    }
    return front;
  }

  // Where a logarithmic axis has its ticks: powers of two for bits, else as round as a handful of them can be.
  function roundValues(values, inBits) {
    if (!values.length) return [];
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const powers = (base, factors) => {
      const [first, last] = [low, high].map((value) => Math.floor(Math.log(value) / Math.log(base)));
      const exponents = Array.from({length: last - first + 2}, (_, index) => first + index);
      return exponents.flatMap((exponent) => factors.map((factor) => factor * base ** exponent))
        .filter((value) => value >= low / 1.3 && value <= high * 1.3);
    };
    if (inBits) return powers(2, [1]);
    const choices = [powers(10, [1, 2, 5]), powers(10, [1, 3]), powers(10, [1])];
    return choices.find((choice) => choice.length >= 3 && choice.length <= 6) ?? evenly(low, high, choices);
  }

  function evenly(low, high, choices) {
    if (high / low > 50) return choices[2];
    const rough = (high - low) / 4 || high / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
    const first = Math.max(1, Math.ceil(low / step - 1e-9));
    return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, index) => Number(((first + index) * step).toPrecision(12)));
  }

  return {valueOf, differingKeys, grouped, withFigures, curveOf, paretoFronts, inOrder, unique, known, roundValues};
})();
