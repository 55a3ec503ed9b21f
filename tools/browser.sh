# Chromium for the tests of the notebooks in a browser: nothing to do where there is one, else Debian's, if root may install it.
for name in chromium google-chrome chromium-browser; do command -v $name >/dev/null && exit 0; done
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 1
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -qq -y --no-install-recommends chromium >/dev/null 2>&1; }
install || { apt-get update -qq >/dev/null 2>&1 && install; }
