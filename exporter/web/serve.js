"use strict"
// The page of `emoexport serve`: a picture goes to /v1/predict, the face that is looked at to /v1/explain.

const FRAME_MS = 200 // from one frame of the camera to the next, at least
const KINDS = /^image\/(avif|bmp|gif|jpeg|png|tiff|webp)$/ // what the server decodes; others are drawn by the browser first
const LONGEST = 1600 // of what the page makes smaller, because it is too large to be sent, or a frame

const $ = id => document.getElementById(id)
const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`
const colour = label => `var(--${label}, var(--blue))`

let model = null
let shown = null // the last answer: { image, file, answer, chosen, live }
let stream = null
let turn = 0 // of pictures: an answer that was overtaken is not shown

function make(tag, attributes = {}, ...inside) {
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  made.append(...inside)
  return made
}

async function ask(path, body, type) {
  let found
  try {
    found = await fetch(path, body ? { method: "POST", body, headers: { "Content-Type": type } } : {})
  } catch {
    throw new Error("The server does not answer.")
  }
  const answer = await found.json()
  if (!found.ok) throw new Error([answer.error, answer.next && `Next: ${answer.next}.`].filter(Boolean).join(" "))
  return answer
}

function tell(problem) {
  $("problem").textContent = problem ? problem.message ?? problem : ""
  $("problem").hidden = !problem
}

// The engine

async function introduce() {
  model = await ask("v1/model")
  $("bundle").textContent = model.bundle
  const held = model.certificate && model.certificate.verdict === "certified"
  $("certified").replaceChildren(
    make("span", { "aria-hidden": "true" }, held ? "✓" : "!"),
    ` ${model.engine}, ${held ? "certified" : "without a certificate that holds here"}`
  )
  $("why").textContent = model.why
  const of = model.certificate
  $("certificate").textContent = of
    ? `Certificate of ${of.created.slice(0, 10)}, on ${of.faces.toLocaleString("en")} faces of ${of.data.split("/").pop()} (${of.split}): ${of.verdict}; ` +
      `accuracy no worse than ${of.bound_points.toFixed(2)} points against the reference, other labels on at most ` +
      `${of.disagreement_bound_pct.toFixed(2)} % of the faces.`
    : "No certificate: nothing has shown that this engine decides here as the reference does."
  $("notes").replaceChildren(...model.notes.map(note => make("p", { class: "missing" }, note)))
  $("detect-choice").hidden = !model.detects
  $("detect").checked = model.detects
  const thresholds = model.decision.thresholds
  $("thresholds").textContent = Object.keys(thresholds).length
    ? "▏is the probability that an emotion needs to be decided, where it has such a threshold."
    : "No emotion of this bundle has a threshold."
  drawBars(null)
}

// Pictures in

async function take(file) {
  stop()
  let image = null
  try {
    image = await decoded(file)
  } catch (problem) {
    forget() // or what stands here would seem to be of this file
    tell(problem)
    return
  }
  await look(image, file).catch(tell)
}

async function decoded(file) {
  const url = URL.createObjectURL(file)
  const image = new Image()
  image.src = url
  try {
    await image.decode()
    return await createImageBitmap(image) // upright
  } catch {
    throw new Error("The browser cannot read this picture.")
  } finally {
    URL.revokeObjectURL(url)
  }
}

async function look(image, file, { live = false } = {}) {
  const mine = ++turn
  const limit = 1e6 * model.limits.max_megabytes
  const body = file && KINDS.test(file.type) && file.size <= limit ? file : await smaller(image)
  const detect = $("detect").checked && model.detects
  const begun = performance.now()
  const answer = await ask(`v1/predict?crop=1&detect=${Number(detect)}`, body, body.type)
  if (mine !== turn) return
  tell(answer.faces.length || live ? null : "No face was found. Without “find the faces” the whole picture is one.")
  answer.seen_ms = performance.now() - begun
  const chosen = live && shown ? Math.max(0, Math.min(shown.chosen, answer.faces.length - 1)) : 0
  if (shown && shown.image !== image) shown.image.close()
  shown = { image, file, answer, chosen, live }
  show()
  if (!live) await explain()
}

function smaller(image) {
  const scale = Math.min(1, LONGEST / Math.max(image.width, image.height))
  const canvas = make("canvas")
  canvas.width = Math.round(image.width * scale)
  canvas.height = Math.round(image.height * scale)
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height)
  return new Promise(resolve => canvas.toBlob(resolve, "image/jpeg", 0.92))
}

// The camera: the next frame is taken when the last one is answered, and never sooner than FRAME_MS after it.

async function start() {
  if (!navigator.mediaDevices) {
    tell("Browsers give the camera to pages of this machine and of https alone.")
    return
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 640 } } })
  } catch (problem) {
    tell(`The camera cannot be used: ${problem.message}.`)
    return
  }
  const video = $("video")
  video.srcObject = stream
  await video.play()
  $("camera").setAttribute("aria-pressed", "true")
  $("camera").textContent = "Stop the camera"
  $("votes").hidden = true
  $("votes-said").textContent = "The votes on the last frame stand here when the camera is stopped."
  const mine = stream
  while (stream === mine) {
    const next = performance.now() + FRAME_MS
    try {
      await look(await createImageBitmap(video), null, { live: true })
    } catch (problem) {
      if (stream === mine) tell(problem)
    }
    await new Promise(resolve => setTimeout(resolve, Math.max(0, next - performance.now())))
  }
}

function stop() {
  if (!stream) return
  stream.getTracks().forEach(track => track.stop())
  stream = null
  turn += 1 // the frame that is under way is not shown
  $("camera").setAttribute("aria-pressed", "false")
  $("camera").textContent = "Use the camera"
  if (shown) shown.live = false
}

// What was answered

function show() {
  const { image, answer, chosen } = shown
  $("stage").classList.add("filled")
  $("invitation").hidden = true
  draw(image, answer, chosen)
  const several = answer.faces.length > 1
  $("choose").hidden = !several
  $("choose").replaceChildren(...(several ? answer.faces.map(button) : []))
  const face = answer.faces[chosen]
  const said = face ? `${face.label}, ${percent(face.confidence)} sure` : "No face"
  if ($("label").textContent !== said) $("label").textContent = said // it is read aloud when it changes
  $("rule").textContent = face ? face.rule.sentence : "Nothing is decided."
  $("rule").dataset.rule = face ? face.rule.name : ""
  $("crop").hidden = !face
  if (face) $("crop").src = face.crop
  drawBars(face)
  const spent = answer.latency_ms
  const facts = [
    ["there and back", `${answer.seen_ms.toFixed(0)} ms`],
    ["read, faces found", `${spent.read.toFixed(0)} ms`],
    ["waited", `${spent.queue.toFixed(1)} ms`],
    ["engine", `${spent.engine.toFixed(0)} ms`],
    ["faces in the call", answer.batch],
    ["precision", answer.precision],
  ]
  $("facts").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, `${value}`))))
}

function forget() {
  turn += 1
  shown = null
  for (const name of ["canvas", "choose", "crop", "votes"]) $(name).hidden = true
  $("stage").classList.remove("filled")
  $("invitation").hidden = false
  $("label").textContent = "No face"
  $("rule").textContent = "Nothing is decided."
  $("votes-said").textContent = ""
  $("facts").replaceChildren()
  drawBars(null)
}

function button(face, number) {
  const made = make("button", { type: "button", "aria-pressed": number === shown.chosen }, `${number + 1}: ${face.label}`)
  made.addEventListener("click", () => choose(number))
  return made
}

async function choose(number) {
  shown.chosen = number
  show()
  $("choose").children[number]?.focus()
  if (!shown.live) await explain().catch(tell)
}

function draw(image, answer, chosen) {
  const canvas = $("canvas")
  canvas.hidden = false
  canvas.width = image.width
  canvas.height = image.height
  const to = canvas.getContext("2d")
  to.drawImage(image, 0, 0)
  const scale = image.width / answer.picture.width
  const thick = Math.max(1, Math.max(image.width, image.height) / 260)
  answer.faces.forEach((face, number) => {
    if (!face.box) return
    const [left, top, right, bottom] = face.box.map(side => side * scale)
    const text = answer.faces.length > 1 ? `${number + 1}: ${face.label}` : face.label
    to.font = `600 ${9 * thick}px system-ui, sans-serif`
    const width = to.measureText(text).width + 6 * thick
    const above = top > 12 * thick ? top - 12 * thick : top
    to.lineWidth = number === chosen ? 2.4 * thick : 1.4 * thick
    to.strokeStyle = "#ffffff"
    to.strokeRect(left, top, right - left, bottom - top)
    to.lineWidth *= 0.55
    to.strokeStyle = "#0072b2"
    to.strokeRect(left, top, right - left, bottom - top)
    to.fillStyle = number === chosen ? "#005a8d" : "#333a43"
    to.fillRect(left, above, width, 12 * thick)
    to.fillStyle = "#ffffff"
    to.fillText(text, left + 3 * thick, above + 9 * thick)
  })
  const said = answer.faces.map(face => `${face.label}, ${percent(face.confidence)}`).join("; ")
  canvas.setAttribute("aria-label", said ? `A picture with ${answer.faces.length} faces: ${said}` : "A picture without a face")
}

function drawBars(face) {
  $("bars").replaceChildren(
    ...model.labels.map(label => {
      const value = face ? face.probabilities[label] : 0
      const threshold = model.decision.thresholds[label]
      const fill = make("div", { class: "fill" })
      fill.style.width = `${100 * value}%`
      fill.style.background = colour(label)
      const track = make("div", { class: "track", "aria-hidden": "true" }, fill)
      if (threshold !== undefined) {
        const mark = make("div", { class: "threshold", title: `threshold ${percent(threshold, 0)}` })
        mark.style.left = `${100 * threshold}%`
        track.append(mark)
      }
      const needs = threshold === undefined ? label : `${label}, threshold ${percent(threshold, 0)}`
      return make(
        "li",
        { class: face && face.label === label ? "decisive" : "" },
        make("span", { title: needs }, label),
        track,
        make("span", { class: "value" }, face ? percent(value) : "")
      )
    })
  )
}

// The votes

async function explain() {
  const face = shown.answer.faces[shown.chosen]
  const mine = turn
  $("votes").hidden = true
  if (!face) {
    $("votes-said").textContent = "Without a face nobody votes."
    return
  }
  const bytes = Uint8Array.from(atob(face.crop.split(",")[1]), one => one.charCodeAt(0))
  const found = await ask("v1/explain", new Blob([bytes]), "image/png")
  if (mine !== turn || stream || face !== shown.answer.faces[shown.chosen]) return
  if (!found.scores) {
    $("votes-said").textContent = `The votes are not to be had: ${found.why}`
    return
  }
  drawVotes(found, face.label)
}

function drawVotes(found, decided) {
  const voted = found.scores.map(member => member.map(scores => scores.indexOf(Math.max(...scores))))
  const asked = (member, view) => !found.weights || found.weights[member][view] > 0
  let cast = 0
  let agreeing = 0
  const rows = found.views.map((view, row) => {
    const cells = found.scores.map((member, column) => {
      if (!asked(column, row)) return make("td", { class: "silent", title: "no part in the vote" }, "–")
      const label = found.labels[voted[column][row]]
      const value = member[row][voted[column][row]]
      cast += 1
      agreeing += label === decided
      const cell = make("td", { class: label === decided ? "" : "other", title: `${label} ${percent(value)}` })
      cell.append(make("b", {}, label), make("span", {}, (100 * value).toFixed(0)))
      cell.style.background = `color-mix(in srgb, ${colour(label)} ${(10 + 40 * value).toFixed(0)}%, var(--paper))`
      return cell
    })
    return make("tr", {}, make("th", { scope: "row" }, view), ...cells)
  })
  const heads = found.members.map((name, number) => make("th", { scope: "col", title: name }, `${number + 1}`))
  const corner = make("th", { scope: "col" }, "view, member")
  const table = make("table", { class: "votes" }, make("thead", {}, make("tr", {}, corner, ...heads)), make("tbody", {}, ...rows))
  $("votes").replaceChildren(table)
  $("votes").hidden = false
  $("votes-said").textContent =
    `${agreeing} of ${cast} passes say ${decided}; each cell has what one member says of one view, and its ` +
    "probability in percent before the decision's temperature; votes for another emotion are in italics."
}

// Ways in

$("file").addEventListener("change", event => {
  const file = event.target.files[0]
  if (file) take(file)
  event.target.value = "" // the same one may be chosen again
})
$("camera").addEventListener("click", () => {
  if (!stream) return start()
  stop()
  return shown ? explain().catch(tell) : null
})
$("detect").addEventListener("change", () => shown && !stream && look(shown.image, shown.file).catch(tell))
addEventListener("paste", event => event.clipboardData.files[0] && take(event.clipboardData.files[0]))
addEventListener("dragover", event => {
  event.preventDefault()
  $("stage").classList.add("over")
})
addEventListener("dragleave", event => event.relatedTarget || $("stage").classList.remove("over"))
addEventListener("drop", event => {
  event.preventDefault()
  $("stage").classList.remove("over")
  const file = event.dataTransfer.files[0]
  if (file) take(file)
})
addEventListener("pagehide", stop)

introduce().catch(tell)
