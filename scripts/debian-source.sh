# Packages and sources of the Debian archives that this machine is configured for, through private apt lists, so that nothing of
# the system's apt configuration changes; apt checks signatures. Sourced by the scripts that need one.
# shellcheck shell=bash

# The Debian archives of this machine's own configuration, as apt itself understands it (either list format).
debian_archives() {
	apt-get indextargets --format '$(REPO_URI)|$(ORIGIN)|$(LABEL)' 'Created-By: Packages' 2>/dev/null |
		awk -F'|' '$2 == "Debian" && $3 == "Debian" { print $1 }' | sort -u
}

# private_lists TYPE SUITE URI FOLDER: reads the lists of one suite into FOLDER. TYPE is deb or deb-src. Sets APT_OPTIONS, with
# which apt-get and apt-cache see these lists and no others.
private_lists() {
	local type=$1 suite=$2 uri=$3 folder=$4 signed='' keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial" || return 1
	[ -r "$keyring" ] && signed="[signed-by=$keyring] "
	printf '%s %s%s %s main\n' "$type" "$signed" "$uri" "$suite" >"$folder/sources.list"
	# What is installed here does not matter (an empty status file), and apt's own user may not write to FOLDER.
	: >"$folder/status"
	APT_OPTIONS=(-q -o "Dir::Etc::SourceList=$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null
		-o "Dir::State::Lists=$folder/lists" -o "Dir::State::status=$folder/status" -o "Dir::Cache=$folder/cache"
		-o APT::Sandbox::User=root -o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30)
	step apt-get "${APT_OPTIONS[@]}" --error-on=any update
}

# fetch_source SUITE URI FOLDER SOURCE[=VERSION]: its source tarball in FOLDER.
fetch_source() {
	local folder=$3 source=$4
	private_lists deb-src "$1" "$2" "$folder" || return 1
	(cd "$folder" && step apt-get "${APT_OPTIONS[@]}" source --tar-only --download-only "$source") || return 1
	ls "$folder/${source%%=*}"_*.orig.tar.* >/dev/null 2>&1
}

# fetch_kernel SUITE URI FOLDER META: the package of the kernel that META (linux-image-cloud-amd64, say) stands for in a suite,
# in FOLDER.
fetch_kernel() {
	local folder=$3 package
	private_lists deb "$1" "$2" "$folder" || return 1
	package=$(apt-cache "${APT_OPTIONS[@]}" depends --important "$4" 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }')
	[ -n "$package" ] || {
		printf 'suite %s of %s has no %s\n' "$1" "$2" "$4"
		return 1
	}
	(cd "$folder" && step apt-get "${APT_OPTIONS[@]}" download "$package") && ls "$folder/$package"_*.deb >/dev/null 2>&1
}
