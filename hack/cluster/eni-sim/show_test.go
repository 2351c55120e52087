package main

import (
	"bytes"
	"net/netip"
	"testing"
	"time"
)

func TestShow(t *testing.T) {
	p := newPool(netip.MustParsePrefix(testSubnet), netip.MustParsePrefix(testSubnet6), 2)
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	empty := "POD   ADDRESSES   SANDBOX   SINCE\n\nNext address: 10.112.1.2 (2 of 2 free)\nNext IPv6 address: fd00:112:1::2 (2 of 2 free)\n"
	if got := print(t, p, "table"); got != empty {
		t.Errorf("empty table:\n%s", got)
	}
	if _, err := p.take("shop/web-0", families{ipv4: true}, "0123456789abcdef", "u1", since); err != nil {
		t.Fatal(err)
	}
	if _, err := p.take("shop/web-1", families{ipv4: true, ipv6: true}, "fedcba", "", since); err != nil {
		t.Fatal(err)
	}
	table := `POD          ADDRESSES                  SANDBOX         SINCE
shop/web-0   10.112.1.2                 0123456789abc   2026-01-02T03:04:05Z
shop/web-1   10.112.1.3,fd00:112:1::2   fedcba          2026-01-02T03:04:05Z

Next address: none, the pool is exhausted
Next IPv6 address: fd00:112:1::3 (1 of 2 free)
`
	if got := print(t, p, "table"); got != table {
		t.Errorf("table:\n%s\nwant:\n%s", got, table)
	}
	json := `{
  "pods": [
    {
      "pod": "shop/web-0",
      "ipv4": "10.112.1.2",
      "container": "0123456789abcdef",
      "podUID": "u1",
      "since": "2026-01-02T03:04:05Z"
    },
    {
      "pod": "shop/web-1",
      "ipv4": "10.112.1.3",
      "ipv6": "fd00:112:1::2",
      "container": "fedcba",
      "since": "2026-01-02T03:04:05Z"
    }
  ],
  "ipv4": {
    "next": null,
    "free": 0
  },
  "ipv6": {
    "next": "fd00:112:1::3",
    "free": 1
  }
}
`
	if got := print(t, p, "json"); got != json {
		t.Errorf("json:\n%s\nwant:\n%s", got, json)
	}
}

func print(t *testing.T, p *pool, form string) string {
	t.Helper()
	var out bytes.Buffer
	show := showTable
	if form == "json" {
		show = showJSON
	}
	if err := show(&out, p); err != nil {
		t.Fatal(err)
	}
	return out.String()
}
