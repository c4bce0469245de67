"""A headless Chromium that tests drive by its DevTools protocol, over the pipes that it opens for that."""
import base64
import contextlib
import functools
import json
import os
import shutil
import subprocess
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class QuietHandler(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, '.mjs': 'text/javascript', '.wasm': 'application/wasm'}

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    """URL of a folder on the loopback interface."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_address[1]}/'
    finally:
        server.shutdown()
        server.server_close()


class Browser:
    """One tab.

    Args:
        profile: Folder for what it remembers.
        width: Of its window, in pixels.
        height: Likewise.

    Attributes:
        said: Errors and warnings of the console, and exceptions.
        requested: URLs that were asked for.
    """

    def __init__(self, profile, width=1000, height=1600):
        to_browser, ours = os.pipe()
        theirs, from_browser = os.pipe()

        def as_three_and_four():  # where Chromium reads and writes
            first, second = os.dup(to_browser), os.dup(from_browser)
            os.dup2(first, 3)
            os.dup2(second, 4)
        self.process = subprocess.Popen(
            [CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe',
             '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream', '--disable-dev-shm-usage',
             '--disable-background-networking', '--no-first-run', '--disable-component-update',
             f'--user-data-dir={profile}', 'about:blank'],
            preexec_fn=as_three_and_four, close_fds=False, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.out = os.fdopen(ours, 'wb', buffering=0)
        self.incoming = os.fdopen(theirs, 'rb', buffering=0)
        self.left, self.count, self.session = b'', 0, None
        self.said, self.requested = [], []
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network', 'DOM'):
            self.call(f'{domain}.enable')
        self.resize(width, height)

    def resize(self, width, height, mobile=False):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def _message(self):
        while b'\0' not in self.left:
            chunk = self.incoming.read(65536)
            if not chunk:
                raise RuntimeError('the browser has ended')
            self.left += chunk
        message, _, self.left = self.left.partition(b'\0')
        return json.loads(message)

    def call(self, method, **params):
        """Answer to a command; what happens meanwhile is noted."""
        self.count += 1
        number = self.count
        message = dict(id=number, method=method, params=params, **({'sessionId': self.session} if self.session else {}))
        self.out.write(json.dumps(message).encode() + b'\0')
        while True:
            answer = self._message()
            if answer.get('id') == number:
                if 'error' in answer:
                    raise RuntimeError(f'{method}: {answer["error"]["message"]}')
                return answer['result']
            self._note(answer.get('method'), answer.get('params', {}))

    def _note(self, method, params):
        if method == 'Runtime.exceptionThrown':
            self.said.append(params['exceptionDetails'].get('exception', {}).get('description') or str(params))
        elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning', 'assert'):
            self.said.append(' '.join(str(arg.get('value', arg.get('description'))) for arg in params['args']))
        elif method == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
            self.said.append(f'{params["entry"]["text"]} {params["entry"].get("url", "")}')
        elif method == 'Network.requestWillBeSent':
            self.requested.append(params['request']['url'])

    def open(self, url):
        self.call('Page.navigate', url=url)

    def run(self, expression):
        """Value of a JavaScript expression; a promise is waited for."""
        found = self.call('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in found:
            raise RuntimeError(found['exceptionDetails'].get('exception', {}).get('description') or str(found))
        return found['result'].get('value')

    def wait_for(self, expression, seconds=120):
        end = time.monotonic() + seconds
        while not self.run(expression):
            if time.monotonic() > end:
                text = self.run('document.body.innerText')
                raise RuntimeError(f'{expression} does not come true; the page says: {text}')
            time.sleep(0.05)

    def choose_file(self, selector, path):
        root = self.call('DOM.getDocument')['root']['nodeId']
        node = self.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
        self.call('DOM.setFileInputFiles', files=[str(path)], nodeId=node)

    def screenshot(self, path):
        taken = self.call('Page.captureScreenshot', format='png', captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken['data']))

    def close(self):
        with contextlib.suppress(OSError, RuntimeError):
            self.session = None
            self.call('Browser.close')
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.out.close()
        self.incoming.close()
