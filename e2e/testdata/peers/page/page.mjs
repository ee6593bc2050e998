// Looks at pillion's page with a real browser, as a person would, and says what is wrong with it.
//
// Usage: node page.mjs CHROMIUM PAGE CONTROL PICTURES
//
// PAGE is the page's address. Asking CONTROL makes traffic: /busy some of all kinds, /request?path=…&status=… one request,
// /steady as much of it as a
// good picture needs, /shut shuts or opens a gate, /cut ends every connection to the page's server. Pictures of the page go into the directory PICTURES.
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { chromium } from 'playwright-core';

const [executablePath, page_, control, pictures] = process.argv.slice(2);
const profile = mkdtempSync(join(tmpdir(), 'page-'));
const browser = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  viewport: { width: 1280, height: 800 },
  colorScheme: 'light',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync'],
});
const make = async what => assert.equal((await fetch(control + what)).status, 200, what);

try {
  const page = await browser.newPage();
  const wrong = [];
  page.on('console', message => { if (['error', 'warning'].includes(message.type())) wrong.push('console: ' + message.text()); });
  page.on('pageerror', error => wrong.push('error: ' + error));
  page.on('requestfailed', request => wrong.push('failed: ' + request.url() + ' ' + request.failure().errorText));
  page.on('response', response => { if (response.status() >= 400) wrong.push(response.status() + ' ' + response.url()); });
  page.on('request', request => { if (!request.url().startsWith(page_) && !request.url().startsWith('data:')) wrong.push('elsewhere: ' + request.url()); });
  const rows = () => page.locator('#records tr');
  const until = (condition, argument) => page.waitForFunction(condition, argument, { timeout: 15000 });
  const narrow = () => page.evaluate(() => document.documentElement.scrollWidth <= innerWidth);
  const picture = name => page.screenshot({ path: join(pictures, name + '.png'), fullPage: true });

  // Empty, it says so.
  await page.goto(page_);
  await until(() => document.getElementById('link').textContent === 'live');
  await page.getByText('No traffic yet. What ends appears here.').waitFor();
  await page.getByText('No traffic yet.', { exact: true }).waitFor();
  await page.getByText('nobody has called yet').waitFor();
  await page.getByText('none since the start').waitFor();
  await picture('empty');
  const before = await page.evaluate(() => document.querySelector('.records').getBoundingClientRect().top);

  // It fills by itself, and nothing on it moves.
  await make('/busy');
  await until(() => document.querySelectorAll('#records tr').length >= 40);
  await until(() => document.getElementById('requests').textContent !== '0');
  await until(() => document.querySelectorAll('#destinations tr').length >= 5 && document.querySelectorAll('#openConnections tr').length >= 5);
  const after = await page.evaluate(() => document.querySelector('.records').getBoundingClientRect().top);
  assert.equal(after, before, 'the list of records jumped');

  // What a stranger sends is text.
  const hostile = '/<script>window.hit=1</script><img src=x onerror="window.hit=1">&amp;';
  await make('/request?status=404&path=' + encodeURIComponent(hostile));
  await until(path => [...document.querySelectorAll('#records td')].some(cell => cell.textContent === 'GET ' + path), hostile);
  assert.equal(await page.evaluate(() => window.hit), undefined, 'the script of a path ran');
  assert.equal(await page.locator('main img, main script').count(), 0, 'a path became markup');

  // A filter stays while records come.
  await page.locator('#filter').fill('503 /checkout');
  await make('/request?status=503&path=/checkout/first');
  await page.getByText('/checkout/first').waitFor();
  const some = await rows().count();
  await make('/request?status=200&path=/checkout/fine');
  await make('/request?status=503&path=/checkout/second');
  await page.getByText('/checkout/second').waitFor();
  assert.equal(await rows().count(), some + 1);
  for (const row of await rows().allInnerTexts()) assert.match(row, /503[^]*\/checkout/);
  assert.equal(await page.locator('#filter').inputValue(), '503 /checkout');
  await page.locator('#filter').fill('nothing has this');
  await page.getByText('No record fits the filter.').waitFor();
  await page.locator('#filter').fill('');

  // What is paused stays.
  await page.locator('#pause').click();
  await make('/request?status=200&path=/while/paused');
  const asked = await page.locator('#uptime').innerText();
  await until(text => document.getElementById('uptime').textContent !== text, asked); // a second later
  assert.equal(await page.getByText('/while/paused').count(), 0);
  await page.locator('#pause').click();
  await page.getByText('/while/paused').waitFor();

  // Readiness has gates, and names those that are shut.
  await page.getByText('ready', { exact: true }).waitFor();
  await make('/shut');
  await page.getByText('not ready: addresses').waitFor();
  await make('/shut');
  await page.getByText('ready', { exact: true }).waitFor();

  await make('/steady');

  // Both colour schemes, a wide and a narrow window.
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const light = await ground();
  await picture('light');
  await page.setViewportSize({ width: 1280, height: 1060 });
  await page.evaluate(() => scrollTo(0, 0));
  await page.screenshot({ path: join(pictures, 'page.png') });
  await page.emulateMedia({ colorScheme: 'dark' });
  assert.notEqual(await ground(), light, 'dark is as light');
  await picture('dark');
  assert.ok(await narrow(), 'too wide for 1280 pixels');
  await page.setViewportSize({ width: 400, height: 800 });
  await make('/busy');
  const width = await page.locator('#uptime').innerText();
  await until(text => document.getElementById('uptime').textContent !== text, width);
  assert.ok(await narrow(), 'too wide for 400 pixels');
  await picture('narrow');
  assert.deepEqual(wrong, []);

  // When the agent goes the page says so, and goes on when it is there again.
  await page.evaluate(() => {
    window.seen = [];
    new MutationObserver(() => window.seen.push(document.getElementById('link').textContent))
      .observe(document.getElementById('link'), { childList: true });
  });
  await make('/cut');
  await until(() => window.seen.includes('reconnecting') && window.seen.at(-1) === 'live');
} finally {
  await browser.close();
  rmSync(profile, { recursive: true, force: true });
}
