// Uses a site behind a gateway from a real browser, and fails for the first promise that does not hold.
//
// Usage: node gateway.mjs CHROMIUM ADDRESS KEYS
//
// ADDRESS is the gateway's: it serves shop.example and, with another certificate, api.example and a.other.example by HTTPS at
// port 8443, and redirects plain requests at port 8080. KEYS are the hashes of the certificates' keys, for --ignore-certificate-errors-spki-list.
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { chromium } from 'playwright-core';

const [executablePath, address, keys] = process.argv.slice(2);
const profile = mkdtempSync(join(tmpdir(), 'gateway-'));
const patience = 60_000; // ms: a browser beside other tests is slow
const browser = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  timeout: patience,
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
    '--disable-sync', '--no-proxy-server', '--host-resolver-rules=MAP * ' + address, '--ignore-certificate-errors-spki-list=' + keys],
});

// All of these run in the page.
const steps = {
  'many requests at once': async () => {
    const texts = await Promise.all(Array.from({ length: 100 }, async (_, i) => (await fetch('/n/' + i)).text()));
    return texts.every((text, i) => text === 'shop shop.example:8443/n/' + i);
  },
  'an upload': async () => {
    const body = new Uint8Array(8 << 20).map((_, i) => i * 31 % 251);
    const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', body));
    const want = Array.from(hash, b => b.toString(16).padStart(2, '0')).join('');
    return await (await fetch('/hash', { method: 'POST', body: new Blob([body]) })).text() === want;
  },
  'a download': async () => (await (await fetch('/large')).arrayBuffer()).byteLength === 16 << 20,
  'an abandoned download': async () => {
    const control = new AbortController();
    const reader = (await fetch('/large', { signal: control.signal })).body.getReader();
    await reader.read();
    control.abort();
    return (await fetch('/n/1')).ok;
  },
  'cookies as one field': async () => {
    for (let i = 0; i < 20; i++) document.cookie = 'c' + i + '=' + 'v'.repeat(i);
    return await (await fetch('/cookies')).text() === '1 20';
  },
  'each event at once': () => new Promise((resolve, reject) => {
    const events = new EventSource('/events');
    const seen = [];
    events.onerror = () => reject(new Error('events: ' + seen));
    events.onmessage = async event => {
      seen.push(event.data);
      if (seen.length === 5) { events.close(); resolve(seen.join() === '0,1,2,3,4'); }
      else await fetch('/next', { method: 'POST' }); // only then the server sends another
    };
  }),
  'a WebSocket': () => new Promise((resolve, reject) => {
    const socket = new WebSocket('wss://shop.example:8443/echo', 'echo');
    socket.binaryType = 'arraybuffer';
    socket.onerror = () => reject(new Error('the WebSocket failed'));
    socket.onopen = () => { socket.send('text'); socket.send(new Uint8Array(1 << 20)); };
    const seen = [];
    socket.onmessage = ({ data }) => { seen.push(data.byteLength ?? data); if (seen.length === 2) socket.close(4000, 'done'); };
    socket.onclose = ({ code }) => resolve(code === 4000 && seen.join() === 'text,' + (1 << 20));
  }),
};

try {
  browser.setDefaultTimeout(patience);
  const page = await browser.newPage();
  await page.goto('http://shop.example:8080/redirected');
  assert.equal(page.url(), 'https://shop.example:8443/redirected');
  const protocol = () => page.evaluate(() => performance.getEntriesByType('navigation')[0].nextHopProtocol);
  assert.equal(await protocol(), 'h2');
  for (const [name, step] of Object.entries(steps)) assert.equal(await page.evaluate(step), true, name);
  for (const host of ['api.example', 'a.other.example', 'shop.example']) { // the first two may share a connection
    await page.goto('https://' + host + ':8443/x');
    assert.equal(await page.evaluate(() => document.body.innerText), (host === 'shop.example' ? 'shop ' : 'rest ') + host + ':8443/x');
    assert.equal(await protocol(), 'h2');
  }
} finally {
  await browser.close();
  rmSync(profile, { recursive: true, force: true });
}
