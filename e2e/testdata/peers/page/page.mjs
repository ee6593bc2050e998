// Opens pillion's page in a real browser, uses it as a person would, and fails for the first promise that does not hold.
//
// Usage: node page.mjs CHROMIUM PAGE CONTROL PICTURES
//
// PAGE is the page's address. Requests to CONTROL make traffic: /busy some of all kinds, /request?path=…&status=… one
// request, /steady as much as a good picture needs, /shut closes or opens a gate, /cut ends every connection to the page's
// server. Pictures of the page go into the directory PICTURES.
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import axe from 'axe-core';
import { chromium } from 'playwright-core';

const [executablePath, page_, control, pictures] = process.argv.slice(2);
const profile = mkdtempSync(join(tmpdir(), 'page-'));
const patience = 60_000; // ms: a browser beside other tests is slow
const browser = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  viewport: { width: 1280, height: 800 },
  colorScheme: 'light',
  timeout: patience,
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync'],
});
const make = async what => assert.equal((await fetch(control + what)).status, 200, what);

try {
  browser.setDefaultTimeout(patience);
  const page = await browser.newPage();
  const wrong = [];
  page.on('console', message => { if (['error', 'warning'].includes(message.type())) wrong.push('console: ' + message.text()); });
  page.on('pageerror', error => wrong.push('error: ' + error));
  page.on('requestfailed', request => wrong.push('failed: ' + request.url() + ' ' + request.failure().errorText));
  page.on('response', response => { if (response.status() >= 400) wrong.push(response.status() + ' ' + response.url()); });
  page.on('request', request => { if (!request.url().startsWith(page_) && !request.url().startsWith('data:')) wrong.push('elsewhere: ' + request.url()); });
  const rows = () => page.locator('#records tr');
  const until = (condition, argument) => page.waitForFunction(condition, argument, { timeout: patience });
  const narrow = () => page.evaluate(() => document.documentElement.scrollWidth <= innerWidth);
  const picture = name => page.screenshot({ path: join(pictures, name + '.png'), fullPage: true });

  // axe fails for contrast below 4.5:1, scroll areas without a label, empty headers and the like.
  const accessible = async what => {
    const found = await page.evaluate(async source => {
      (0, eval)(source); // the page's own policy does not apply to the browser's driver
      return (await axe.run(document, { resultTypes: ['violations'] })).violations
        .map(v => v.id + ': ' + v.nodes.slice(0, 5).map(n => n.target.join(' ') + ' ' + n.failureSummary).join('; '));
    }, axe.source);
    assert.deepEqual(found, [], what);
  };
  // At every width method and path are readable, no number is cut, and the page does not scroll sideways.
  const readable = async what => {
    const problems = await page.evaluate(() => {
      const list = [];
      const shown = cell => cell.getClientRects().length > 0;
      for (const cell of document.querySelectorAll('td.n, th.n, .big, .key span, td.c-in, td.c-out, th'))
        if (shown(cell) && cell.scrollWidth > cell.clientWidth && !(getComputedStyle(cell).display === 'inline'))
          list.push('cut: ' + (cell.id || cell.className) + ' ' + cell.textContent);
      for (const cell of document.querySelectorAll('#records td.what'))
        if (shown(cell) && cell.clientWidth < 240) list.push('the request has ' + cell.clientWidth + ' px: ' + cell.textContent);
      for (const cell of document.querySelectorAll('#destinations td.mono'))
        if (shown(cell) && cell.clientWidth < 120) list.push('the destination has ' + cell.clientWidth + ' px: ' + cell.textContent);
      const boxes = [...document.querySelectorAll('#pod text')].map(e => [e.textContent, e.getBoundingClientRect()]);
      boxes.forEach(([name, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3) list.push('overlap: ' + name + ', ' + other);
      }));
      if (document.documentElement.scrollWidth > innerWidth) list.push('too wide');
      return [...new Set(list)].slice(0, 8);
    });
    assert.deepEqual(problems, [], what);
  };

  // Without traffic the page states that.
  await page.goto(page_);
  await until(() => document.getElementById('link').textContent === 'live');
  await page.getByText('No traffic yet. Requests and connections appear here when they end.').waitFor();
  await page.getByText('No traffic yet.', { exact: true }).waitFor();
  await page.getByText('no inbound traffic yet').waitFor();
  await page.getByText('no errors since the start').waitFor();
  await page.getByText('shop/web-7c9', { exact: true }).waitFor();
  assert.match(await page.title(), /^shop\/web-7c9/);
  await accessible('empty');
  await picture('empty');
  const before = await page.evaluate(() => document.querySelector('.records').getBoundingClientRect().top);

  // It fills without a reload, and the layout does not move.
  await make('/busy');
  await until(() => document.querySelectorAll('#records tr').length >= 40);
  await until(() => document.getElementById('requests').textContent !== '0');
  await until(() => document.querySelectorAll('#destinations tr').length >= 5 && document.querySelectorAll('#openConnections tr').length >= 5);
  const after = await page.evaluate(() => document.querySelector('.records').getBoundingClientRect().top);
  assert.equal(after, before, 'the list of records jumped');

  // Text from clients stays text.
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
  await page.getByText('No record matches the filter.').waitFor();
  await page.locator('#filter').fill('');

  // A click on a destination or a reason filters the records; a second click ends that.
  // The rows are sorted again each second, so a button is found and clicked in one step.
  const clicked = async (place, name, filter, fits) => {
    const click = () => page.evaluate(([place, name]) =>
      [...document.querySelectorAll(place + ' button')].find(button => button.textContent.includes(name)).click(), [place, name]);
    await click();
    assert.equal(await page.locator('#filter').inputValue(), filter);
    const texts = await rows().allInnerTexts();
    assert.ok(texts.length > 0, 'no record for ' + name);
    for (const row of texts) assert.match(row, fits);
    await click();
    assert.equal(await page.locator('#filter').inputValue(), '');
  };
  await clicked('#destinations', 'inventory:9090', 'outbound inventory:9090', /out[^]*inventory:9090/);
  await clicked('#reasons', 'upstream_refused', 'upstream_refused', /upstream_refused/);
  await clicked('#reasons', 'status_5xx', 'status_5xx', /50[34]/);

  // Totals count from the start.
  assert.match(await page.locator('#requestsIn').innerText(), /\/s, [1-9]\d* total$/);
  assert.match(await page.locator('#errorsAll').innerText(), /^[1-9]\d* of [1-9]\d* in total$/);

  // A paused list does not change.
  await page.locator('#pause').click();
  await make('/request?status=200&path=/while/paused');
  const asked = await page.locator('#uptime').innerText();
  await until(text => document.getElementById('uptime').textContent !== text, asked); // a second later
  assert.equal(await page.getByText('/while/paused').count(), 0);
  await page.locator('#pause').click();
  await page.getByText('/while/paused').waitFor();

  // Closed gates are named.
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

  // Five widths in both colour schemes.
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme });
    for (const width of [640, 768, 1024, 1280, 1440]) {
      await page.setViewportSize({ width, height: 800 });
      await readable(width + ' px, ' + colorScheme);
      await accessible(width + ' px, ' + colorScheme);
      await picture(colorScheme + '-' + width);
    }
  }
  assert.deepEqual(wrong, []);

  // The page shows that the connection is lost, and reconnects.
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
