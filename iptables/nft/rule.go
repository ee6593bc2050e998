package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// A rule in nftables is a list of expressions: load something into a register, compare it, act. We write each rule in one
// way only, and understand what is there by turning it into a Rule and that into expressions again: what does not come
// out the same is not ours.
//
// Expressions are built with package expr. It is of no use for reading: it passes over expressions that it does not know,
// so that a rule with one more condition would look like ours, and it cannot read three kinds of those that we write.

// kernelRule is a rule as the kernel keeps it.
type kernelRule struct {
	chain       string
	comment     string
	expressions []expression
	// Set by the kernel.
	protocol uint8 // the number of the table's family
	table    string
	handle   uint64
}

// expression holds the attributes of an expression. Values that the kernel wraps are unwrapped.
type expression struct {
	name       string
	attributes attributes
	message    []byte // as sent to the kernel
}

func (e expression) value(kind uint16) []byte { return e.attributes.value(kind) }

func (e expression) number(kind uint16) uint32 { return bigEndian(e.value(kind)) }

func (e expression) equal(other expression) bool {
	return e.name == other.name && (e.name == "counter" || e.attributes.equal(other.attributes))
}

// attributes are netlink attributes in the order of the message. A rule has hundreds of short lists of them, and a map for
// each would cost most of the memory of a run.
type attributes []attribute

type attribute struct {
	kind  uint16
	value []byte
}

// value returns the value of an attribute, or nil.
func (list attributes) value(kind uint16) []byte {
	for _, a := range list {
		if a.kind == kind {
			return a.value
		}
	}
	return nil
}

func (list attributes) has(kind uint16) bool {
	return slices.ContainsFunc(list, func(a attribute) bool { return a.kind == kind })
}

// equal ignores the order.
func (list attributes) equal(other attributes) bool {
	return len(list) == len(other) && !slices.ContainsFunc(list, func(a attribute) bool { return !other.has(a.kind) || !bytes.Equal(a.value, other.value(a.kind)) })
}

// readAttributes reads the attributes of a message. Values are parts of it.
func readAttributes(message []byte) (attributes, error) {
	var list attributes
	for {
		n := 0
		for rest := message; len(rest) >= unix.SizeofRtAttr; n++ {
			size := int(binary.NativeEndian.Uint16(rest))
			if size < unix.SizeofRtAttr || size > len(rest) {
				return nil, fmt.Errorf("an attribute of %d bytes in %d: %w", size, len(rest), unix.EINVAL)
			}
			if list != nil {
				list[n] = attribute{binary.NativeEndian.Uint16(rest[2:]) & nl.NLA_TYPE_MASK, rest[unix.SizeofRtAttr:size:size]}
			}
			rest = rest[min((size+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(rest)):]
		}
		if list != nil || n == 0 {
			return list, nil
		}
		list = make(attributes, n)
	}
}

func (r kernelRule) equal(other kernelRule) bool {
	return r.chain == other.chain && r.comment == other.comment && slices.EqualFunc(r.expressions, other.expressions, expression.equal)
}

// The chains of iptables that we use, in one table of family inet: the base chains are for both families, ours for one.

// chainName returns the nftables name of a chain, such as nat_output or ipv6_nat_in_redirect. Base chains serve both
// families; our other chains serve one.
func chainName(family ruleset.Family, at ruleset.Place) string {
	if name, own := strings.CutPrefix(at.Chain, ruleset.OwnPrefix); own {
		return fmt.Sprintf("%s_%s_%s", family, at.Table, strings.ToLower(name))
	}
	return fmt.Sprintf("%s_%s", at.Table, strings.ToLower(at.Chain))
}

// placeOf is the inverse of chainName. The family of a base chain is 0.
func placeOf(name string) (family ruleset.Family, at ruleset.Place, ok bool) {
	table, chain, _ := strings.Cut(strings.ToUpper(name), "_")
	for _, f := range ruleset.Families {
		if strings.EqualFold(table, f.String()) {
			family = f
			table, chain, _ = strings.Cut(chain, "_")
			chain = ruleset.OwnPrefix + chain
		}
	}
	at = ruleset.Place{Table: ruleset.TableName(strings.ToLower(table)), Chain: chain}
	known := family != 0 || chain == ruleset.ChainPrerouting || chain == ruleset.ChainBuiltOutput
	return family, at, known && slices.Contains(ruleset.TableNames, at.Table) && chainName(family, at) == name
}

// register is the only register that our rules use.
const register = 1

// encode translates a rule to nftables. TPROXY needs two rules there: without a listening socket, the nftables target
// lets the packet continue to the workload, where the iptables target drops it. The second rule drops it.
func encode(family ruleset.Family, at ruleset.Place, r ruleset.Rule) []kernelRule {
	conditions := encodeMatch(r.Match, family, strings.HasPrefix(at.Chain, ruleset.OwnPrefix))
	rules := [][]expr.Any{slices.Concat(conditions, []expr.Any{&expr.Counter{}}, encodeTarget(family, at.Table, r.Target))}
	if _, tproxy := r.Target.(ruleset.ToSocket); tproxy {
		rules = append(rules, slices.Concat(conditions, []expr.Any{&expr.Counter{}}, encodeTarget(family, at.Table, ruleset.Drop{})))
	}
	var list []kernelRule
	for _, expressions := range rules {
		list = append(list, newRule(chainName(family, at), ruleset.CommentPrefix+r.ID, expressions))
	}
	return list
}

func newRule(chain, comment string, expressions []expr.Any) kernelRule {
	rule := kernelRule{chain: chain, comment: comment, expressions: make([]expression, len(expressions))}
	for i, e := range expressions {
		rule.expressions[i] = flatten(e)
	}
	return rule
}

// encodeMatch returns the conditions. Our own chains serve one family, so only an access to the network header needs a
// test for it.
func encodeMatch(m ruleset.Match, family ruleset.Family, own bool) []expr.Any {
	var all []expr.Any
	add := func(load expr.Any, not bool, value []byte) {
		all = append(all, load, compare(not, value))
	}
	meta := func(key expr.MetaKey) expr.Any { return &expr.Meta{Key: key, Register: register} }
	if !own || m.Src.IsValid() || m.Dst.IsValid() {
		add(meta(expr.MetaKeyNFPROTO), false, []byte{nfProtocol(family)})
	}
	for _, address := range []struct {
		prefix netip.Prefix
		offset uint32 // in the header
		not    bool
	}{{m.Src, addressOffset(family), false}, {m.Dst, addressOffset(family) + uint32(ruleset.AddressesOf(family).Anywhere.BitLen()/8), m.NotDst}} {
		if !address.prefix.IsValid() {
			continue
		}
		// A prefix of whole bytes loads only these bytes, as nft does.
		value, bits := address.prefix.Masked().Addr().AsSlice(), address.prefix.Bits()
		if bits%8 == 0 {
			value = value[:bits/8]
		}
		all = append(all, &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: address.offset, Len: uint32(len(value))})
		if bits%8 != 0 {
			all = append(all, masked(mask(address.prefix)))
		}
		all = append(all, compare(address.not, value))
	}
	if m.In != "" {
		add(meta(expr.MetaKeyIIFNAME), false, interfaceName(m.In))
	}
	if m.Out != "" {
		add(meta(expr.MetaKeyOIFNAME), false, interfaceName(m.Out))
	}
	if m.Protocol != "" {
		add(meta(expr.MetaKeyL4PROTO), false, []byte{map[ruleset.Protocol]byte{ruleset.TCP: unix.IPPROTO_TCP, ruleset.UDP: unix.IPPROTO_UDP}[m.Protocol]})
	}
	for offset, ports := range []capture.PortRange{m.SrcPorts, m.DstPorts} {
		if ports.First != 0 {
			all = append(all,
				&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: uint32(2 * offset), Len: 2},
				within(offset == 1 && m.NotDstPorts, binaryutil.BigEndian.PutUint16(ports.First), binaryutil.BigEndian.PutUint16(ports.Last)))
		}
	}
	if m.Owner.Kind != ruleset.Anybody {
		key := map[ruleset.OwnerKind]expr.MetaKey{ruleset.UID: expr.MetaKeySKUID, ruleset.GID: expr.MetaKeySKGID}[m.Owner.Kind]
		if all = append(all, meta(key)); m.Owner.IDs.First == m.Owner.IDs.Last {
			all = append(all, compare(false, native(m.Owner.IDs.First)))
		} else {
			all = append(all,
				&expr.Byteorder{SourceRegister: register, DestRegister: register, Op: expr.ByteorderHton, Len: 4, Size: 4},
				within(false, binaryutil.BigEndian.PutUint32(m.Owner.IDs.First), binaryutil.BigEndian.PutUint32(m.Owner.IDs.Last)))
		}
	}
	if m.Mark != 0 {
		add(meta(expr.MetaKeyMARK), m.NotMark, native(m.Mark))
	}
	if m.State != "" {
		all = append(all, &expr.Ct{Key: expr.CtKeySTATE, Register: register}, masked(native(stateBits[m.State])), compare(true, native(0)))
	}
	if m.ConnMark != 0 {
		add(&expr.Ct{Key: expr.CtKeyMARK, Register: register}, false, native(m.ConnMark))
	}
	return all
}

var stateBits = map[ruleset.State]uint32{
	ruleset.Invalid:     expr.CtStateBitINVALID,
	ruleset.Established: expr.CtStateBitRELATED | expr.CtStateBitESTABLISHED,
}

func compare(not bool, value []byte) expr.Any {
	return &expr.Cmp{Op: operator(not), Register: register, Data: value}
}

// within compares with a range in network byte order.
func within(not bool, first, last []byte) expr.Any {
	if bytes.Equal(first, last) {
		return compare(not, first)
	}
	return &expr.Range{Op: operator(not), Register: register, FromData: first, ToData: last}
}

func operator(not bool) expr.CmpOp {
	if not {
		return expr.CmpOpNeq
	}
	return expr.CmpOpEq
}

func masked(bits []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: register, DestRegister: register, Len: uint32(len(bits)), Mask: bits, Xor: make([]byte, len(bits))}
}

// native returns a number in host byte order, as registers hold it.
func native(number uint32) []byte { return binaryutil.NativeEndian.PutUint32(number) }

func nfProtocol(family ruleset.Family) byte {
	if family == ruleset.IPv6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}

// addressOffset is the offset of the source address in the network header. The destination follows it.
func addressOffset(family ruleset.Family) uint32 {
	if family == ruleset.IPv6 {
		return 8
	}
	return 12
}

func mask(prefix netip.Prefix) []byte {
	all := bytes.Repeat([]byte{0xff}, prefix.Addr().BitLen()/8)
	ones, _ := netip.AddrFromSlice(all)
	return netip.PrefixFrom(ones, prefix.Bits()).Masked().Addr().AsSlice()
}

// interfaceName returns the bytes to compare: the whole name, or the part before the wildcard.
func interfaceName(name string) []byte {
	if stem, wildcard := strings.CutSuffix(name, "+"); wildcard {
		return []byte(stem)
	}
	return append([]byte(name), make([]byte, max(unix.IFNAMSIZ-len(name), 0))...)
}

func encodeTarget(family ruleset.Family, table ruleset.TableName, target ruleset.Target) []expr.Any {
	immediate := func(value []byte) expr.Any { return &expr.Immediate{Register: register, Data: value} }
	markPacket := &expr.Meta{Key: expr.MetaKeyMARK, Register: register, SourceRegister: true}
	markConnection := &expr.Ct{Key: expr.CtKeyMARK, Register: register, SourceRegister: true}
	switch target := target.(type) {
	case ruleset.Return:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}
	case ruleset.Accept:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	case ruleset.Drop:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	case ruleset.Jump:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chainName(family, ruleset.Place{Table: table, Chain: string(target)})}}
	case ruleset.Redirect:
		const toPort = 2 // NF_NAT_RANGE_PROTO_SPECIFIED
		return []expr.Any{
			immediate(binaryutil.BigEndian.PutUint16(uint16(target))),
			&expr.Redir{RegisterProtoMin: register, RegisterProtoMax: register, Flags: toPort},
		}
	case ruleset.ToSocket:
		return []expr.Any{
			immediate(binaryutil.BigEndian.PutUint16(target.To.Port())),
			&expr.TProxy{Family: nfProtocol(family), RegPort: register},
			immediate(native(target.Mark)), markPacket,
			&expr.Verdict{Kind: expr.VerdictAccept},
		}
	case ruleset.SetMark:
		return []expr.Any{immediate(native(uint32(target))), markPacket}
	case ruleset.SetConnMark:
		return []expr.Any{immediate(native(uint32(target))), markConnection}
	case ruleset.SaveMark:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: register}, markConnection}
	case ruleset.RestoreMark:
		return []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: register}, markPacket}
	case ruleset.Zone:
		return []expr.Any{
			immediate(binaryutil.NativeEndian.PutUint16(uint16(target))),
			&expr.Ct{Key: expr.CtKeyZONE, Register: register, SourceRegister: true},
		}
	}
	panic(fmt.Sprintf("no such target: %T", target))
}

// decode reads the rules of a chain. family is that of the chain, or 0 for a base chain. Rules in a base chain contain
// their family; a rule without one counts as IPv4.
func decode(family ruleset.Family, at ruleset.Place, rules []kernelRule) map[ruleset.Family][]ruleset.Rule {
	found := make(map[ruleset.Family][]ruleset.Rule)
	for len(rules) > 0 {
		of, rule, ok := rules[0].understand(at.Table)
		of = max(of, ruleset.IPv4)
		if family != 0 {
			of = family
		}
		taken := 1
		if ok {
			same := encode(of, at, rule)
			taken = len(same)
			ok = taken <= len(rules) && slices.EqualFunc(same, rules[:taken], kernelRule.equal)
		}
		if !ok {
			rule, taken = ruleset.Rule{Foreign: rules[0].describe(at)}, 1
		}
		found[of] = append(found[of], rule)
		rules = rules[taken:]
	}
	return found
}

// describe describes a foreign rule for people, who find it by its handle. The text ends like a rule of iptables, so
// that its ID is found.
func (r kernelRule) describe(at ruleset.Place) string {
	text := fmt.Sprintf("-A %s [a rule of nftables, handle %d:", at.Chain, r.handle)
	for _, e := range r.expressions {
		text += " " + e.name
	}
	text += "]"
	if r.comment != "" {
		text += fmt.Sprintf(` -m comment --comment "%s"`, r.comment)
	}
	return text
}

// understand reads a rule loosely. The caller encodes the result and compares.
func (r kernelRule) understand(table ruleset.TableName) (family ruleset.Family, rule ruleset.Rule, ok bool) {
	var id string
	if id, ok = strings.CutPrefix(r.comment, ruleset.CommentPrefix); !ok {
		return 0, rule, false
	}
	rule.ID = id
	var loaded expression // the content of the register
	var bits []byte       // the bits of it that are compared
	for _, e := range r.expressions {
		switch e.name {
		case "counter", "byteorder":
		case "bitwise":
			bits = e.value(unix.NFTA_BITWISE_MASK)
		case "cmp":
			value := e.value(unix.NFTA_CMP_DATA)
			not := e.number(unix.NFTA_CMP_OP) == unix.NFT_CMP_NEQ
			if loaded.name == "meta" && loaded.number(unix.NFTA_META_KEY) == unix.NFT_META_NFPROTO {
				family = map[string]ruleset.Family{string(byte(unix.NFPROTO_IPV4)): ruleset.IPv4, string(byte(unix.NFPROTO_IPV6)): ruleset.IPv6}[string(value)]
			} else if !readCondition(&rule.Match, loaded, bits, not, value, value) {
				return family, rule, false
			}
		case "range":
			not := e.number(unix.NFTA_RANGE_OP) == unix.NFT_RANGE_NEQ
			if !readCondition(&rule.Match, loaded, nil, not, e.value(unix.NFTA_RANGE_FROM_DATA), e.value(unix.NFTA_RANGE_TO_DATA)) {
				return family, rule, false
			}
		default:
			sets := e.name == "meta" && e.attributes.has(unix.NFTA_META_SREG) || e.name == "ct" && e.attributes.has(unix.NFTA_CT_SREG)
			action := sets || e.name == "redir" || e.name == "tproxy" || e.name == "immediate" && e.number(unix.NFTA_IMMEDIATE_DREG) == unix.NFT_REG_VERDICT
			if action && !readAction(&rule, table, loaded, e) {
				return family, rule, false
			}
			if !action {
				loaded, bits = e, nil
			}
		}
	}
	return family, rule, rule.Target != nil
}

// readCondition reads a comparison of the loaded value with a range, or with one value in first and last.
func readCondition(m *ruleset.Match, loaded expression, bits []byte, not bool, first, last []byte) (ok bool) {
	ports := capture.PortRange{First: uint16(bigEndianOf(first)), Last: uint16(bigEndianOf(last))}
	switch loaded.name {
	case "payload":
		offset := loaded.number(unix.NFTA_PAYLOAD_OFFSET)
		if loaded.number(unix.NFTA_PAYLOAD_BASE) == unix.NFT_PAYLOAD_TRANSPORT_HEADER {
			if offset == 0 {
				m.SrcPorts = ports
			} else {
				m.DstPorts, m.NotDstPorts = ports, not
			}
			return true
		}
		for _, family := range ruleset.Families {
			size := uint32(ruleset.AddressesOf(family).Anywhere.BitLen() / 8)
			switch offset {
			case addressOffset(family):
				m.Src, ok = prefixOf(first, bits, size)
			case addressOffset(family) + size:
				m.Dst, ok = prefixOf(first, bits, size)
				m.NotDst = not
			}
		}
		return ok
	case "meta":
		switch loaded.number(unix.NFTA_META_KEY) {
		case unix.NFT_META_IIFNAME:
			m.In = nameOf(first)
		case unix.NFT_META_OIFNAME:
			m.Out = nameOf(first)
		case unix.NFT_META_L4PROTO:
			m.Protocol, ok = map[string]ruleset.Protocol{string(byte(unix.IPPROTO_TCP)): ruleset.TCP, string(byte(unix.IPPROTO_UDP)): ruleset.UDP}[string(first)]
			return ok
		case unix.NFT_META_SKUID:
			m.Owner = ruleset.Owner{Kind: ruleset.UID, IDs: idsOf(first, last)}
		case unix.NFT_META_SKGID:
			m.Owner = ruleset.Owner{Kind: ruleset.GID, IDs: idsOf(first, last)}
		case unix.NFT_META_MARK:
			m.Mark, m.NotMark = nativeOf(first), not
		default:
			return false
		}
	case "ct":
		switch loaded.number(unix.NFTA_CT_KEY) {
		case unix.NFT_CT_STATE:
			for state, stateBits := range stateBits {
				if stateBits == nativeOf(bits) {
					m.State = state
				}
			}
			return m.State != ""
		case unix.NFT_CT_MARK:
			m.ConnMark = nativeOf(first)
		default:
			return false
		}
	default:
		return false
	}
	return true
}

// readAction reads an action. loaded is its operand.
func readAction(r *ruleset.Rule, table ruleset.TableName, loaded, e expression) (ok bool) {
	value := loaded.value(unix.NFTA_IMMEDIATE_DATA)
	switch e.name {
	case "redir":
		r.Target = ruleset.Redirect(bigEndianOf(value))
	case "tproxy":
		anywhere := ruleset.AddressesOf(ruleset.IPv4).Anywhere
		if e.number(nftaTPROXYFamily) == unix.NFPROTO_IPV6 {
			anywhere = ruleset.AddressesOf(ruleset.IPv6).Anywhere
		}
		r.Target = ruleset.ToSocket{To: netip.AddrPortFrom(anywhere, uint16(bigEndianOf(value)))}
	case "meta":
		socket, tproxy := r.Target.(ruleset.ToSocket)
		switch {
		case tproxy:
			socket.Mark = nativeOf(value)
			r.Target = socket
		case loaded.name == "ct":
			r.Target = ruleset.RestoreMark{}
		default:
			r.Target = ruleset.SetMark(nativeOf(value))
		}
	case "ct":
		switch {
		case e.number(unix.NFTA_CT_KEY) == unix.NFT_CT_ZONE && len(value) == 2:
			r.Target = ruleset.Zone(binaryutil.NativeEndian.Uint16(value))
		case loaded.name == "meta":
			r.Target = ruleset.SaveMark{}
		default:
			r.Target = ruleset.SetConnMark(nativeOf(value))
		}
	default:
		return readVerdict(r, table, e.value(unix.NFTA_IMMEDIATE_DATA))
	}
	return true
}

// readVerdict reads a verdict code, and the chain of a jump.
func readVerdict(r *ruleset.Rule, table ruleset.TableName, verdict []byte) (ok bool) {
	if len(verdict) < 4 {
		return false
	}
	switch int32(bigEndian(verdict)) {
	case unix.NFT_RETURN:
		r.Target = ruleset.Return{}
	case unix.NFT_JUMP:
		_, at, known := placeOf(unix.ByteSliceToString(verdict[4:]))
		r.Target = ruleset.Jump(at.Chain)
		return known && at.Table == table
	case int32(expr.VerdictAccept):
		if _, tproxy := r.Target.(ruleset.ToSocket); !tproxy {
			r.Target = ruleset.Accept{}
		}
	case int32(expr.VerdictDrop):
		r.Target = ruleset.Drop{}
	default:
		return false
	}
	return true
}

const nftaTPROXYFamily = 1 // NFTA_TPROXY_FAMILY of linux/netfilter/nf_tables.h

// prefixOf reads a prefix from the first bytes of an address of size bytes. bits is the mask, or nil if all bytes
// count.
func prefixOf(value, bits []byte, size uint32) (netip.Prefix, bool) {
	ones := 8 * len(value)
	whole := make([]byte, size)
	copy(whole, value)
	address, ok := netip.AddrFromSlice(whole)
	if bits != nil {
		ones = 0
		for _, b := range bits {
			for ; b&0x80 != 0; b <<= 1 {
				ones++
			}
		}
	}
	prefix := netip.PrefixFrom(address, ones)
	return prefix, ok && prefix.IsValid()
}

// idsOf reads one number in host byte order, or a range in network byte order (range comparisons require it).
func idsOf(first, last []byte) capture.IDRange {
	if bytes.Equal(first, last) {
		return capture.IDRange{First: nativeOf(first), Last: nativeOf(first)}
	}
	return capture.IDRange{First: bigEndian(first), Last: bigEndian(last)}
}

func nameOf(value []byte) string {
	if len(value) < unix.IFNAMSIZ {
		return string(value) + "+"
	}
	return unix.ByteSliceToString(value)
}

// bigEndianOf reads a number of up to four bytes.
func bigEndianOf(value []byte) uint32 {
	var number uint32
	for _, b := range value[:min(len(value), 4)] {
		number = number<<8 | uint32(b)
	}
	return number
}

func nativeOf(value []byte) uint32 {
	if len(value) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(value)
}

// flatten turns an expression of ours into the form that equal compares.
func flatten(e expr.Any) expression {
	message, err := expr.Marshal(unix.NFPROTO_INET, e)
	if err != nil {
		panic(err) // a bug in this file
	}
	flat, err := readExpression(message)
	if err != nil {
		panic(err)
	}
	return flat
}

// readExpression reads the name and attributes of an expression.
func readExpression(message []byte) (expression, error) {
	e := expression{message: message}
	outer, err := readAttributes(message)
	if err != nil {
		return e, err
	}
	e.name = unix.ByteSliceToString(outer.value(unix.NFTA_EXPR_NAME))
	if e.attributes, err = readAttributes(outer.value(unix.NFTA_EXPR_DATA)); err != nil {
		return e, err
	}
	for i, a := range e.attributes {
		if e.attributes[i].value, err = e.unwrap(a.kind, a.value); err != nil {
			return e, err
		}
	}
	if e.name == "bitwise" && e.number(nftaBitwiseOp) == 0 { // older kernels have one operation and omit the attribute
		e.attributes = slices.DeleteFunc(e.attributes, func(a attribute) bool { return a.kind == nftaBitwiseOp })
	}
	return e, nil
}

const nftaBitwiseOp = 6 // NFTA_BITWISE_OP of linux/netfilter/nf_tables.h

// wrapped lists the attributes whose value is in a nested attribute.
var wrapped = map[string][]uint16{
	"cmp":       {unix.NFTA_CMP_DATA},
	"range":     {unix.NFTA_RANGE_FROM_DATA, unix.NFTA_RANGE_TO_DATA},
	"bitwise":   {unix.NFTA_BITWISE_MASK, unix.NFTA_BITWISE_XOR},
	"immediate": {unix.NFTA_IMMEDIATE_DATA},
}

// unwrap returns the bytes of a value. Those of a verdict are its code and the chain.
func (e expression) unwrap(kind uint16, value []byte) ([]byte, error) {
	if !slices.Contains(wrapped[e.name], kind) {
		return value, nil
	}
	wrapping, err := readAttributes(value)
	if err != nil || len(wrapping) != 1 {
		return value, err
	}
	data := wrapping[0].value
	if wrapping[0].kind != unix.NFTA_DATA_VERDICT {
		return data, nil
	}
	parts, err := readAttributes(data)
	if err != nil {
		return nil, err
	}
	var verdict []byte
	for _, part := range parts {
		verdict = append(verdict, part.value...)
	}
	return verdict, nil
}
